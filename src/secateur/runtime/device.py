"""Where networks run: find an accelerator by name, wait for it, and know what it can't do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from secateur.runtime.distributed import local_rank, rank_and_world_size
from secateur.runtime.errors import UsageError

CPU = torch.device("cpu")


AUTO = "auto"


def find_device(name: str) -> torch.device:
    """Return the device that `cpu`, `cuda`, `cuda:1`, `mps` or `xpu` names; `auto` is the best.

    That is the accelerator if there is one, else the CPU. It becomes the current device of the
    process. Of several processes each takes the accelerator of its own `LOCAL_RANK`. Raises
    `UsageError` if there is no such device.
    """
    accelerator = _accelerator()
    if name == AUTO:
        name = accelerator or "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"--device {name}: expected auto, cpu, cuda, cuda:1, mps or xpu"
        ) from error
    if device.type == "cpu":
        return CPU
    if device.type != accelerator:
        raise UsageError(f"--device {name} is not here: {_what_is_here(accelerator)}")
    module = torch.get_device_module(device)
    if not hasattr(module, "set_device"):  # of Apple's there is one
        return torch.device(device.type, 0)
    count, processes = torch.accelerator.device_count(), rank_and_world_size()[1]
    if processes > 1 and device.index is not None:
        raise UsageError(
            f"--device {name}: each of {processes} processes needs a device of its own: write "
            f"--device {device.type}"
        )
    index = local_rank() if processes > 1 else device.index
    if index is not None and index >= count:
        hint = f"torchrun --nproc-per-node={count}" if processes > 1 else "count from 0"
        raise UsageError(f"--device {device.type}:{index} is not here: there are {count}; {hint}")
    if index is not None:
        module.set_device(index)
    return torch.device(device.type, module.current_device())


def _accelerator() -> str | None:
    """Return the type of the accelerator; None without one."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else accelerator.type


def _what_is_here(accelerator: str | None) -> str:
    if accelerator is not None:
        return f"this machine has {accelerator}; write --device {accelerator}, auto or cpu"
    return (
        "torch finds no accelerator; write --device cpu, or install the torch that belongs to your "
        "driver (pytorch.org/get-started)"
    )


def accelerator_name(device: torch.device) -> str | None:
    """Return torch's name of a device; None if it is the CPU."""
    if device.type == "cpu":
        return None
    device_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(device) if device_name is None else str(device_name(device))  # Apple's has none


@contextlib.contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make a device that of the process for a block: the one that `synchronize` waits for."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    with module.device(device) if hasattr(module, "device") else contextlib.nullcontext():
        yield


@functools.cache
def sums_device(device: torch.device) -> torch.device:
    """Return where sums in float64 of a device's tensors are computed: there, or on the CPU.

    Apple's devices have no float64, and some of Intel's.
    """
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum()
    except (RuntimeError, TypeError):
        return CPU
    return device


def synchronize() -> None:
    """Return once the accelerator, if there is one, has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute products of float32 in float32 for a block, not in TensorFloat-32 or less.

    TensorFloat-32 has 10 bits of mantissa, and torch allows it for convolutions by default. The
    settings are those of the process: they are put back at the end. It also serves as a decorator.
    """
    operations = _float32_operations()
    precisions = [operation.fp32_precision for operation in operations]
    cudnn, legacy = torch.backends.cudnn, _legacy_settings()
    if legacy is None:
        for operation in operations:
            operation.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is not None:
            cudnn.allow_tf32, precision = legacy
            torch.set_float32_matmul_precision(precision)
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision


def _float32_operations() -> tuple[Any, ...]:
    """Return what has a setting of its own, since torch 2.9."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    mkldnn: Any = torch.backends.mkldnn
    if not hasattr(cudnn, "conv"):
        return ()
    return (cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)


def _legacy_settings() -> tuple[bool, str] | None:
    """Return the settings of torch before 2.9; None if new ones were chosen that these can't say.

    Code that reads or sets these fails unless they agree with the new ones.
    """
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
