"""What PyTorch offers without documenting it, in one place for when a release changes it.

No other module names such an interface; `scripts/architecture` checks that.
"""

from __future__ import annotations

import functools
import logging
import operator
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.export import ExportedProgram
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.fx.traceback import preserve_node_meta
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as BatchOrInstanceNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "COMPILED_NETWORK",
    "UNCOMPILED_FUNCTION",
    "VALUES_NEEDED",
    "BatchNorm",
    "BatchOrInstanceNorm",
    "Convolution",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "ShapeEnv",
    "composite_operations",
    "cpu_capabilities",
    "fake_of",
    "is_compiled_in_place",
    "is_composite",
    "is_pointwise",
    "make_fx",
    "preserve_node_meta",
    "recompute_kernels",
    "schema_of",
    "set_module_stack",
    "set_stack_trace",
    "share_parameters_with_recurrent_layer",
    "storage_key",
    "tracing_quietly",
    "tree_leaves",
    "tree_map",
    "unset_fake_temporarily",
    "with_versions",
    "without_modes",
]


COMPILED_NETWORK = "_orig_mod"
"""Attribute of a module that `torch.compile` made: the network that it compiles."""
UNCOMPILED_FUNCTION = "_torchdynamo_orig_callable"
"""Attribute of a function that `torch.compile` made: the function that it compiles."""
UNTAGGED = ("aten::leaky_relu", "aten::leaky_relu_")
"""Pointwise operations that torch 2.6 does not say it of, and newer releases do."""
VALUES_NEEDED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
"""What torch raises if code needs the values of a tensor that is traced, not its shape alone."""

schema_of: Callable[[Any], torch.FunctionSchema] = operator.attrgetter("_schema")
"""Return the schema of an ATen or custom operation: its name, arguments and returns."""


@contextmanager
def tracing_quietly() -> Iterator[None]:
    """Inside the block, run compiled parts uncompiled, and don't log errors that are raised."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            yield
    finally:
        logger.disabled = was_disabled


def set_module_stack(stack: Mapping[str, str]) -> None:
    """Record with every operation that is traced from now on the modules that it is called in."""
    traceback.current_meta["nn_module_stack"] = dict(stack)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether `module.compile()` was called, or its `forward` was compiled."""
    has_compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return has_compiled_call or hasattr(vars(module).get("forward"), UNCOMPILED_FUNCTION)


def recompute_kernels(module: nn.Module) -> None:
    """Compute the tensors of a module again that a hook of `torch.nn.utils` computes in a forward.

    These are the older weight and spectral norm, and the masks of `torch.nn.utils.prune`.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            hook(module, ())


def set_stack_trace(text: str) -> None:
    """Record with every operation that is traced from now on where it was called."""
    traceback.current_meta["stack_trace"] = text


def is_pointwise(operation: Any) -> bool:
    """Return whether an operation of a graph works on each element by itself, as torch says."""
    if not isinstance(operation, OpOverload):
        return False
    return torch.Tag.pointwise in operation.tags or schema_of(operation).name in UNTAGGED


def is_composite(operation: OpOverload) -> bool:
    """Return whether torch composes an operation of others."""
    return bool(
        operation.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    )


@functools.cache
def composite_operations() -> dict[OpOverload, Callable[..., Any]]:
    """Return the ATen operations that torch composes of others, each with what composes it."""
    operations: dict[OpOverload, Callable[..., Any]] = {}
    key = "CompositeImplicitAutograd"
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        name, _, overload = qualified.removeprefix("aten::").partition(".")
        packet = getattr(torch.ops.aten, name, None) if qualified.startswith("aten::") else None
        operation = getattr(packet, overload or "default", None)
        if operation is not None and any(
            "Tensor" in str(value.type) for value in schema_of(operation).returns
        ):
            operations[operation] = operation.decompose
    return operations


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a fake tensor like `tensor`: a parameter if it is one.

    `nn.Parameter` would make a second one, and take as long again.
    """
    with mode:
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
    if isinstance(tensor, nn.Parameter):
        fake._is_param = True
    return fake


def share_parameters_with_recurrent_layer(module: nn.RNNBase) -> None:
    """Let an RNN, LSTM or GRU compute with its current parameters, also where they were replaced.

    It holds them in a list of its own, which `torch.func.functional_call` does not know.
    """
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


def with_versions(model: nn.Module, tensors: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Return tensors of `model` as a state dict that its modules' classes would write today.

    `state_dict()` notes the version of every module beside the tensors; a plain dict or a
    safetensors file has lost it, and modules that look at it refuse the tensors (MNASNet) or take
    them for old ones.
    """
    state = OrderedDict(tensors)
    metadata = getattr(model.state_dict(), "_metadata", {})
    for name, module in model.named_modules(remove_duplicate=False):
        if name in metadata:
            metadata[name]["version"] = type(module)._version
    state._metadata = metadata  # type: ignore[attr-defined]
    return state


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that tensors of the same memory share, on any device, as long as one lives.

    Not all devices tell the address.
    """
    key: int = tensor.untyped_storage()._cdata
    return key


@contextmanager
def recompiling(limit: int) -> Iterator[None]:
    """Let `torch.compile` compile code anew this often in a block, in place of 8 times."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: limit}):
        yield


def compile_ahead_of_time(program: ExportedProgram, path: Path) -> None:
    """Write the package of a program that `torch.compile`'s compiler makes ahead of time.

    Weights are constants: batch norms are folded into them, int8 kernels are chosen.
    """
    settings = {"freezing": True}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=settings
    )


def load_compiled(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Return what runs a package that `compile_ahead_of_time` wrote."""
    package = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs: Any = package(*inputs)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    return run


def cpu_capabilities() -> Mapping[str, Any]:
    """Return what torch knows of the CPU: `cpu_name`, and whether it has `avx512_bf16` and more.

    Older releases answer a few questions only.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {
        "cpu_name": _cpu_name(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        # Every CPU with AMX tiles has their bfloat16 products too.
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
    }


def _cpu_name() -> str:
    """Return the CPU's name as Linux tells it, empty elsewhere."""
    if platform.system() != "Linux":
        return ""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")
