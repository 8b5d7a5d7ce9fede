"""Takes a network out of what wraps it, and says what else was passed in its place.

Every function that takes a network from outside calls `unwrapped` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.runtime.errors import TraceError, UsageError
from secateur.runtime.torch_internals import COMPILED_NETWORK

WRAPPERS: dict[str, str] = {
    "OptimizedModule": COMPILED_NETWORK,
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "_FabricModule": "module",
}
"""Class that wraps a network -> the attribute that holds it: torch's, DeepSpeed's, Lightning's."""
SHARDED = ("FullyShardedDataParallel", "DTensor")
"""Classes that hold only this process's part of a network, or of a tensor."""
QUANTISED = (
    *("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.ao.nn.sparse"),
    *("torch.ao.nn.intrinsic.quantized", "torch.ao.nn.intrinsic.qat"),
    *("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize"),
)
"""Packages whose modules compute with whole numbers, or prepare for that."""
FLOAT_FUNCTIONS = "torch.ao.nn.quantized.modules.functional_modules"
"""Holds additions that networks use before they are quantised, too."""
HOLDERS = ("module", "model", "network", "net", "module_", "model_", "ema_model")
"""Attributes in which trainers, learners and pipelines keep their network."""


def unwrapped(model: object) -> nn.Module:
    """Return the network itself, out of `torch.compile`, `DataParallel` and the like.

    It shares all modules and tensors with what wraps it. Raises `UsageError` that says what to pass
    if `model` is something else, such as a state dict, and `TraceError` if it is a network that
    can't be cut in its present state, such as a quantised one.
    """
    network = without_wrappers(require_module(model))
    _check_modules(network)
    _check_tensors(network)
    return network


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return the network that others wrap, or `model` itself; any network is taken."""
    names = [name for name in _class_names(model) if name in WRAPPERS]
    inner = getattr(model, WRAPPERS[names[0]], None) if names else None
    return without_wrappers(inner) if isinstance(inner, nn.Module) else model


def require_module(model: object) -> nn.Module:
    """Return `model`; raise `UsageError` that says what to pass if it is no module."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the network must be an nn.Module: {_what_it_is(model)}")
    return model


def _class_names(value: object) -> list[str]:
    return [base.__name__ for base in type(value).__mro__]


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        subject = f"the network's layer {name!r}" if name else "the network"
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise TraceError(
                f"{subject} is TorchScript ({kind.__name__}), which can't be cut: pass the Python "
                "module that it was made from"
            )
        if any(base in SHARDED for base in _class_names(module)):
            raise TraceError(
                f"{subject} is sharded over processes ({kind.__name__}): gather its weights into "
                "a network of one process and pass that"
            )
        if kind.__module__.startswith(QUANTISED) and kind.__module__ != FLOAT_FUNCTIONS:
            raise TraceError(
                f"{subject} is quantised, or prepared for it ({kind.__name__}): prune the float "
                "network, and quantise the result"
            )
    if isinstance(model, torch.fx.GraphModule) and "eval" in vars(model):
        raise TraceError(
            "the network is a program of torch.export: pass the Python module that was exported"
        )


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        subject = f"the network's tensor {name!r}"
        if is_lazy(tensor):
            raise TraceError(
                f"{subject} has no shape yet, as it belongs to a lazy layer: run the network on a "
                "batch of images once, model(images)"
            )
        if tensor.is_meta:
            raise TraceError(
                f"{subject} has no values, as it is on the meta device: call "
                "model.to_empty(device='cpu') and load its weights"
            )
        if any(base in SHARDED for base in _class_names(tensor)):
            raise TraceError(
                f"{subject} is sharded over processes: gather the weights into a network of one "
                "process and pass that"
            )
        if _is_quantised(tensor):
            raise TraceError(
                f"{subject} is quantised ({type(tensor).__name__} of {tensor.dtype}): prune the "
                "float network, and quantise the result"
            )


def _is_quantised(tensor: Tensor) -> bool:
    """Return whether a tensor holds quantised numbers: torch's, torchao's or bitsandbytes'."""
    has_integers = isinstance(tensor, nn.Parameter) and tensor.dtype in (torch.int8, torch.uint8)
    is_subclass = type(tensor).__module__.startswith("torchao.")
    return tensor.is_quantized or is_subclass or (has_integers and tensor.dim() > 1)


def _what_it_is(value: Any) -> str:
    """Return what was passed in place of a network, and what to pass."""
    kind = type(value).__name__
    if isinstance(value, type):
        return f"{value.__name__} is a class: pass an object of it, {value.__name__}()"
    if isinstance(value, str | Path):
        return (
            f"{str(value)!r} is text: pass the network, as secateur.load_model(name, weights) "
            "returns it"
        )
    if isinstance(value, torch.export.ExportedProgram):
        return "got a program of torch.export: pass the Python module that was exported"
    if isinstance(value, Mapping):
        return _what_mapping_it_is(value)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, nn.Module) for item in value):
            return f"got a {kind} of {len(value)} modules: pass nn.Sequential(*layers)"
        index = next((i for i, item in enumerate(value) if isinstance(item, nn.Module)), None)
        hint = (
            "" if index is None else f": pass its item [{index}], a {type(value[index]).__name__}"
        )
        return f"got a {kind} of {len(value)}{hint}"
    for name in HOLDERS:
        if isinstance(getattr(value, name, None), nn.Module):
            return f"got {kind}: pass its attribute .{name}"
    if callable(value):
        return f"got the function {getattr(value, '__name__', kind)!r}: pass the module it runs"
    return f"got {kind}"


def _what_mapping_it_is(value: Mapping[Any, Any]) -> str:
    for key, item in value.items():
        if isinstance(item, nn.Module):
            return f"got a dict: pass its item [{key!r}], a {type(item).__name__}"
    if any(isinstance(item, Tensor) for item in value.values()):
        return (
            f"got a state dict ({len(value)} tensors), which holds weights alone: build the "
            "network, call its load_state_dict, and pass the network"
        )
    keys = ", ".join(map(repr, list(value)[:5]))
    return (
        f"got a dict with the keys {keys}: if that is a checkpoint, build the network, load the "
        "weights into it, and pass the network"
    )
