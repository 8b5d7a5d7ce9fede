"""Choose the device and the precision that a network computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from secateur.runtime.distributed import rank_and_world_size
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import cpu_capabilities


@contextlib.contextmanager
def autocast(precision: str) -> Iterator[None]:
    """Run a block in bfloat16 on the CPU, if `precision` says so or if it is `auto` and fast."""
    is_enabled = has_fast_bfloat16() if precision == "auto" else precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
        yield


def accelerator_for(precision: str) -> Accelerator:
    """Return accelerate's `Accelerator` for training: device, processes and mixed precision.

    Raises `UsageError` if the device can't compute in the precision.
    """
    is_cpu = not torch.accelerator.is_available()
    if precision == "auto":
        has_cuda = torch.cuda.is_available()
        is_fast = torch.cuda.is_bf16_supported() if has_cuda else is_cpu and has_fast_bfloat16()
        precision = "bfloat16" if is_fast else "float32"
    if precision == "float16" and is_cpu:  # accelerate would compute in float32
        raise UsageError("training in float16 needs an accelerator: try bfloat16 or float32")
    name = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
    # A process may train twice, in different precisions; accelerate would keep the first one.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(cpu=is_cpu, mixed_precision=name)
    except ValueError as error:
        raise UsageError(f"training in {precision} is not possible here: {error}") from error
    if accelerator.num_processes != rank_and_world_size()[1]:
        raise UsageError(
            f"the process group has {rank_and_world_size()[1]} processes, but the environment says "
            f"{accelerator.num_processes}: launch with torchrun or accelerate launch"
        )
    return accelerator


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device for a block, and back afterwards."""
    before = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def accelerator_name() -> str | None:
    """Return torch's name of the accelerator that training runs on; None without one."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device)
    device_name = getattr(module, "get_device_name", None)  # Apple's has none
    return str(device) if device_name is None else str(device_name())


def has_fast_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 products."""
    capabilities = cpu_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))
