"""Reading a module without changing it: its device, its tensors, a copy, evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import TraceError


def copy_of(model: nn.Module, *, share_tensors: bool) -> nn.Module:
    """A copy of the network's modules, around the same parameters and buffers or copies of them.

    Raises `TraceError` where the network can't be copied.
    """
    tensors = [*model.parameters(), *model.buffers()] if share_tensors else []
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # the network is the user's: it may raise anything
        cause = str(error).partition(".")[0]
        raise TraceError(f"the network can't be copied: {cause}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its dotted names, shared ones included; detached."""
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**named, **buffers}.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a network are; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
