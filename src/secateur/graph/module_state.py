"""Read a module without changing it: its device, tensors, a copy, evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.runtime.errors import TraceError
from secateur.runtime.torch_internals import UNCOMPILED_FUNCTION


def copy_of(model: nn.Module, *, share_tensors: bool) -> nn.Module:
    """Return a copy of a network, with the same tensors if `share_tensors`, else with copies.

    Tensors that were computed, such as features that a hook has kept, are copied without their
    history. Objects that can't be copied, such as locks, are shared. A `forward` that was compiled
    is the uncompiled one in the copy. Raises `TraceError` if the network can't be copied.
    """
    tensors = [*model.parameters(), *model.buffers()] if share_tensors else []
    memo = {id(tensor): tensor for tensor in tensors}
    try:
        try:
            with _DetachingCopies():
                copied = copy.deepcopy(model, dict(memo))
        except Exception:  # may be raised by anything that a user keeps in a module
            with _DetachingCopies():
                copied = copy.deepcopy(model, memo | _uncopyable_objects(model))
    except Exception as error:
        cause = str(error).strip() or type(error).__name__
        raise TraceError(f"the network can't be copied: {cause}") from error
    _bind_compiled_forwards(model, copied)
    for module in copied.modules():
        if isinstance(module, nn.DataParallel):
            module.device_ids = []  # the copy may be on another device: it calls its module alone
    return copied


class _DetachingCopies(TorchFunctionMode):
    """Inside the block, a deep copy of a tensor that was computed has no history."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _uncopyable_objects(model: nn.Module) -> dict[int, object]:
    """Return what can't be copied of the attributes of all modules, by id."""
    known = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    uncopyable: dict[int, object] = {}

    def visit(value: object) -> None:
        try:
            with _DetachingCopies():
                copy.deepcopy(value, known | uncopyable)
        except Exception:  # its class may raise anything
            if isinstance(value, dict | list | tuple | set):
                for item in value.values() if isinstance(value, dict) else value:
                    visit(item)
            else:
                uncopyable[id(value)] = value

    for module in model.modules():
        for value in vars(module).values():
            visit(value)
    return uncopyable


def _bind_compiled_forwards(model: nn.Module, copied: nn.Module) -> None:
    """Replace compiled `forward`s of a copy, which run the original, by the copy's own."""
    for name, module in model.named_modules():
        forward = getattr(vars(module).get("forward"), UNCOMPILED_FUNCTION, None)
        if isinstance(forward, MethodType) and forward.__self__ is module:
            its_copy = copied.get_submodule(name)
            vars(its_copy)["forward"] = MethodType(forward.__func__, its_copy)


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


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Let a network be trained in a block: one whose parameters are all frozen thaws for it.

    If some parameters are trainable the others stay frozen.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    frozen = [] if any(parameter.requires_grad for parameter in parameters) else parameters
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer, detached, by each of its dotted names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def owner_of(parameter: str) -> str:
    """Return the dotted name of the module that a parameter belongs to, by the parameter's name."""
    layer, is_parametrized, _ = f".{parameter}".partition(".parametrizations.")
    return layer[1:] if is_parametrized else parameter.rpartition(".")[0]


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Return images on the network's device, and of the type that all its parameters have."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    is_cast = images.is_floating_point() and len(types) == 1
    return images.to(device_of(model), types.pop() if is_cast else images.dtype)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's parameters; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device for a block, and back afterwards."""
    before = device_of(model)
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
