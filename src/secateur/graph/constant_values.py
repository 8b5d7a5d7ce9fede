"""Lets a network read its own constants as numbers while it is traced.

While a network is traced its tensors are fake: they have a shape and no values. A number that its
code reads from a tensor, as in `x.new_full(size, self.stride[0])` or `if self.scale > 1:`, is known
nevertheless if nothing but parameters, buffers and other constants went into that tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.runtime.torch_internals import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    ShapeEnv,
    schema_of,
    tree_map,
    unset_fake_temporarily,
    without_modes,
)

_NUMBER = "_secateur_constant"
"""Attribute of a fake tensor whose values are known."""


@dataclass(eq=False)
class _Constant:
    """An operation on constants, which is computed when a number is read from it."""

    operation: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    index: int | None = None
    """Which of the operation's values this is, if it has several."""


class ConstantReadingMode(FakeTensorMode):
    """Traces with fake tensors, and computes the values of those that no image has gone into.

    `images` is the number of images in the traced batch: what is made of a size that depends on it
    is no constant. `sizes` keeps account of sizes that depend on values; without it, these raise.
    """

    def __init__(self, images: int, sizes: ShapeEnv | None) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=sizes)
        self._images = images
        self._constants: dict[int, Tensor | _Constant] = {}
        """Number of a fake tensor -> its real values, or the operation that computes them."""
        self._numbers = itertools.count()

    def add(self, fake: Tensor, real: Tensor) -> None:
        """Record the values of a parameter or buffer."""
        self._set(fake, real)

    def _set(self, fake: Tensor, constant: Tensor | _Constant) -> None:
        number = next(self._numbers)
        setattr(fake, _NUMBER, number)
        self._constants[number] = constant

    def _is_known(self, fake: Tensor) -> bool:
        return getattr(fake, _NUMBER, None) in self._constants

    def forget_constants(self) -> None:
        """Release all values: the fake tensors of a graph keep their mode alive."""
        self._constants.clear()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Run an operation on fake tensors; return the number if it reads one from constants."""
        if _is_plain(func) and args and not self._is_constant_leaf(args[0]):
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        kwargs = kwargs or {}
        is_constant = self._is_constant(func, args, kwargs)
        if is_constant and torch.Tag.data_dependent_output in func.tags:
            return self._compute(_Constant(func, args, kwargs))
        if is_constant and torch.Tag.dynamic_output_shape in func.tags:
            return tree_map(self._fake_constant, self._compute(_Constant(func, args, kwargs)))
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [i for index in args[1] for i in self._without_mask(index)])
        value = super().__torch_dispatch__(func, types, args, kwargs)
        if schema_of(func).is_mutable:
            self._constants.clear()  # what is written to may have views
        elif is_constant:
            self._record(value, _Constant(func, args, kwargs))
        return value

    def reading_arrays(self) -> TorchFunctionMode:
        """Return a mode in which `tensor.numpy()` makes an array of the values of constants."""
        return _ReadArrays(self)

    def values_of(self, tensor: Tensor) -> Tensor:
        """Return the values of a constant; raise `DataDependentOutputException` for others."""
        if self.is_our_fake(tensor) and not self._is_known(tensor):
            raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
        value: Tensor = self._real(tensor).detach()
        return value

    def _fake_constant(self, real: Any) -> Any:
        """Return a fake tensor with known values in place of a real tensor."""
        if not isinstance(real, Tensor):
            return real
        fake = self.from_tensor(real, static_shapes=True)
        self._set(fake, real)
        return fake

    def _without_mask(self, index: Tensor | None) -> list[Tensor | None]:
        """Return the indices that a constant mask selects; the number of others is not known."""
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if index is None or not is_mask or (self.is_our_fake(index) and not self._is_known(index)):
            return [index]
        return [self._fake_constant(places) for places in self._real(index).nonzero(as_tuple=True)]

    def _record(self, value: object, constant: _Constant) -> None:
        if isinstance(value, FakeTensor):
            self._set(value, constant)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, FakeTensor):
                    operation = constant.operation, constant.args, constant.kwargs
                    self._set(item, _Constant(*operation, index))

    def _is_constant(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        return all(map(self._is_constant_leaf, args)) and all(
            map(self._is_constant_leaf, kwargs.values())
        )

    def _is_constant_leaf(self, value: object) -> bool:
        if isinstance(value, FakeTensor):
            return self._is_known(value)
        if isinstance(value, list | tuple):
            return all(map(self._is_constant_leaf, value))
        return type(value) is not int or value == 0 or value % self._images != 0

    def _compute(self, constant: _Constant) -> Any:
        with unset_fake_temporarily():
            args, kwargs = tree_map(self._real, (constant.args, constant.kwargs))
            value = constant.operation(*args, **kwargs)
        return value if constant.index is None else value[constant.index]

    def _real(self, leaf: Any) -> Any:
        """Return the values of a fake tensor that holds constants; anything else as it is."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        constant = self._constants[getattr(leaf, _NUMBER)]
        if isinstance(constant, _Constant):
            constant = self._compute(constant).detach()
            self._set(leaf, constant)
        return constant


class _ReadArrays(TorchFunctionMode):
    """Inside the block, NumPy arrays are made of the values of tensors, which fake ones lack."""

    def __init__(self, constants: ConstantReadingMode) -> None:
        super().__init__()
        self._constants = constants

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; of values alone, untraced, if it makes an array of them."""
        if func not in (Tensor.numpy, Tensor.__array__):
            return func(*args, **(kwargs or {}))
        tensor, *options = args
        with without_modes():
            return func(self._constants.values_of(tensor), *options, **(kwargs or {}))


@functools.cache
def _is_plain(func: OpOverload) -> bool:
    """Return whether an operation leaves its inputs alone and may not read a constant mask."""
    return not schema_of(func).is_mutable and func is not torch.ops.aten.index.Tensor
