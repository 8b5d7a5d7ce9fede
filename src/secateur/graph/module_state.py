"""Read a module without changing it: its device, tensors, a copy, evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import COMPILED_NETWORK


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network that `torch.compile` has wrapped, or `model` itself if it is not wrapped.

    Both share their modules and tensors; the wrapper's names have a prefix.
    """
    network: nn.Module = getattr(model, COMPILED_NETWORK, model)
    return network


def copy_of(model: nn.Module, *, share_tensors: bool) -> nn.Module:
    """Return a copy of a network, with the same tensors if `share_tensors`, else with copies.

    Raises `TraceError` if the network can't be copied.
    """
    tensors = [*model.parameters(), *model.buffers()] if share_tensors else []
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # the network is the user's: it may raise anything
        cause = str(error).partition(".")[0]
        raise TraceError(f"the network can't be copied: {cause}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a block; afterwards every module has its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer, detached, by each of its dotted names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
