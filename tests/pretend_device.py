"""A pretend accelerator, so that what runs on a device is tested where there is none.

Its tensors say that they are on the device, hold a tensor of the CPU and compute with that, so the
values are those of the CPU. As on a real one, tensors of different devices can't be mixed:
operations accept beside tensors of the device only numbers, tensors without dimensions and, to
index with, integers of the CPU. The device of number 1 has no float64, as Apple's have none.

It says that it is torch's `lazy` device, a type that no backend here uses, and whose tensors can
have gradients without a driver.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
"""The pretend accelerator."""
WITHOUT_FLOAT64 = torch.device("lazy", 1)
"""A second one, where float64 is refused."""

FREE_BYTES = 2**33
"""Memory that is free on it."""

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations that take indices of the CPU."""
_TO_DEVICE = {"aten::_to_copy", "aten::to", "aten::copy", "aten::copy_"}
"""Operations whose arguments may be on two devices."""


class PretendTensor(Tensor):
    """A tensor that says it is on the pretend accelerator."""

    host: Tensor
    """What it holds, on the CPU."""

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> PretendTensor:
        """Return a tensor of the device with the shape, the strides and the type of `host`."""
        with torch.inference_mode(host.is_inference()):
            tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=device,
            )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute an operation on the CPU's tensors; refuse to mix devices."""
        return _compute(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """Return the values and the device."""
        return f"{self.host} on {self.device}"

    def numpy(self, *, force: bool = False) -> Any:
        """Fail: an array lies on the CPU."""
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy: use .cpu() first"
        )

    def tolist(self) -> Any:
        """Return the values."""
        return self.host.tolist()


@contextlib.contextmanager
def pretend_device(on_cpu: Counter[str] | None = None) -> Iterator[torch.device]:
    """Make tensors of the pretend accelerator possible in a block, and return its device.

    `on_cpu` counts the operations that are computed on the CPU's tensors meanwhile, by name.
    """
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` goes through `to`
    try:
        with (
            mock.patch.object(torch, DEVICE.type, _module(), create=True),
            mock.patch.multiple(
                torch.accelerator,
                is_available=lambda: True,
                current_accelerator=lambda check_available=False: torch.device(DEVICE.type),
                device_count=lambda: 2,
                synchronize=lambda: None,
            ),
            _Factories(on_cpu),
        ):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
        torch._C._set_only_lift_cpu_tensors(lifts)


def _module() -> SimpleNamespace:
    """Return what `torch.get_device_module` returns for the device."""
    return SimpleNamespace(
        mem_get_info=lambda device: (FREE_BYTES, 2 * FREE_BYTES),
        memory_reserved=lambda device: 0,
        memory_allocated=lambda device: 0,
        manual_seed=lambda seed: None,
        device_count=lambda: 2,
        set_device=lambda index: None,
        get_rng_state=lambda device: torch.zeros(0, dtype=torch.uint8),
        set_rng_state=lambda state, device: None,
        get_device_name=lambda device: f"pretend {device}",
        current_device=lambda: DEVICE.index,
    )


class _Factories(TorchDispatchMode):
    """Inside the block, tensors can be made on the pretend accelerator and moved to it."""

    def __init__(self, on_cpu: Counter[str] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_cpu = on_cpu

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))  # fake tensors know where they pretend to be
        leaves = tree_leaves((args, dict(kwargs or {})))
        if any(isinstance(leaf, PretendTensor) or _is_pretend(leaf) for leaf in leaves):
            return _compute(func, args, dict(kwargs or {}))
        if self._on_cpu is not None:
            self._on_cpu[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def _is_pretend(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == DEVICE.type


def _host(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.host
    return torch.device("cpu") if _is_pretend(value) else value


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if isinstance(tensor, PretendTensor)}
    requested = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.device)]
    if name not in _TO_DEVICE:
        _refuse_mixing(name, args, tensors, devices)
    if name in ("aten::copy_", "aten::copy"):
        device = args[0].device
    elif name == "aten::to" and len(args) > 1 and isinstance(args[1], Tensor):
        device = args[1].device
    elif requested:
        device = requested[0]
    else:
        device = next(iter(devices))
    if device.type == DEVICE.type and device.index is None:
        device = DEVICE
    result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    known = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, PretendTensor)}

    def on_device(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = known.get(id(value))
        if same is not None and same.device == device:
            return same
        moved = name in _TO_DEVICE and any(value is _host(tensor) for tensor in tensors)
        if moved:  # the host's tensor was returned as it was
            value = value.clone()
        if device.type != DEVICE.type:
            return value
        if device == WITHOUT_FLOAT64 and value.dtype == torch.float64:
            raise TypeError(f"Cannot convert a tensor to float64: {device} has none ({name})")
        return PretendTensor(value, device)

    return tree_map(on_device, result)


def _refuse_mixing(
    name: str, args: tuple[Any, ...], tensors: list[Tensor], devices: set[torch.device]
) -> None:
    allowed: list[Tensor] = []
    if name in _INDEXING and isinstance(args[0], PretendTensor):
        allowed = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
    others = {
        tensor.device
        for tensor in tensors
        if tensor.dim() and not any(tensor is one for one in allowed)
    }
    if devices and len(others) > 1:
        places = " and ".join(sorted(map(str, others)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {places} in {name}"
        )
