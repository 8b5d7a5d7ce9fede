"""Choose the precision that a network computes in."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from secateur.runtime.device import CPU
from secateur.runtime.distributed import rank_and_world_size
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import cpu_capabilities

_DEVICE = "ACCELERATE_TORCH_DEVICE"


@contextlib.contextmanager
def autocast(precision: str, device: torch.device = CPU) -> Iterator[None]:
    """Run a block in bfloat16 on a device, if `precision` says so or if it is `auto` and fast."""
    is_bfloat16 = has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
    if not is_bfloat16 and not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
        yield


def accelerator_for(precision: str, device: torch.device = CPU) -> Accelerator:
    """Return accelerate's `Accelerator` for training on a device: processes and mixed precision.

    Raises `UsageError` if the device can't compute in the precision.
    """
    is_cpu = device.type == "cpu"
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    if precision == "float16" and is_cpu:  # accelerate would compute in float32
        raise UsageError("training in float16 needs an accelerator: try bfloat16 or float32")
    name = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
    # A process may train twice, in different precisions and on different devices; accelerate would
    # keep the first ones.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with _accelerate_on(device):
            accelerator = Accelerator(cpu=is_cpu, mixed_precision=name)
    except ValueError as error:
        raise UsageError(f"training in {precision} is not possible here: {error}") from error
    if accelerator.num_processes != rank_and_world_size()[1]:
        raise UsageError(
            f"the process group has {rank_and_world_size()[1]} processes, but the environment says "
            f"{accelerator.num_processes}: launch with torchrun or accelerate launch"
        )
    return accelerator


def has_fast_bfloat16(device: torch.device = CPU) -> bool:
    """Return whether a device has instructions for bfloat16 products."""
    if device.type != "cpu":
        is_supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        return is_supported is not None and bool(is_supported())
    capabilities = cpu_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@contextlib.contextmanager
def _accelerate_on(device: torch.device) -> Iterator[None]:
    """Let accelerate take a device, which it reads from the environment, in a block."""
    before = os.environ.get(_DEVICE)
    os.environ[_DEVICE] = str(device)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DEVICE]
        else:
            os.environ[_DEVICE] = before
