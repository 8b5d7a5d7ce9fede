"""Lets a network read its own constants as numbers while it is traced.

While a network is traced its tensors are fake: they have a shape and no values. A number that its
code reads from a tensor, as in `x.new_full(size, self.stride[0])` or `if self.scale > 1:`, is known
nevertheless if nothing but parameters, buffers and other constants went into that tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.runtime.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    ShapeEnv,
    TensorKeyDictionary,
    schema_of,
    tree_leaves,
    tree_map,
    unset_fake_temporarily,
)


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
    is no constant.
    """

    def __init__(self, images: int) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self._images = images
        self._constants: Any = TensorKeyDictionary()
        """Fake tensor -> its real values, or the operation that computes them."""

    def add(self, fake: Tensor, real: Tensor) -> None:
        """Record the values of a parameter or buffer."""
        self._constants[fake] = real

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

    def _fake_constant(self, real: Any) -> Any:
        """Return a fake tensor with known values in place of a real tensor."""
        if not isinstance(real, Tensor):
            return real
        fake = self.from_tensor(real)
        self._constants[fake] = real
        return fake

    def _without_mask(self, index: Tensor | None) -> list[Tensor | None]:
        """Return the indices that a constant mask selects; the number of others is not known."""
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        if (
            index is None
            or not is_mask
            or (self.is_our_fake(index) and index not in self._constants)
        ):
            return [index]
        return [self._fake_constant(places) for places in self._real(index).nonzero(as_tuple=True)]

    def _record(self, value: object, constant: _Constant) -> None:
        if isinstance(value, FakeTensor):
            self._constants[value] = constant
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                if isinstance(item, FakeTensor):
                    self._constants[item] = _Constant(
                        constant.operation, constant.args, constant.kwargs, index
                    )

    def _is_constant(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> bool:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, FakeTensor):
                if leaf not in self._constants:
                    return False
            elif type(leaf) is int and leaf and leaf % self._images == 0:
                return False
        return True

    def _compute(self, constant: _Constant) -> Any:
        with unset_fake_temporarily():
            args, kwargs = tree_map(self._real, (constant.args, constant.kwargs))
            value = constant.operation(*args, **kwargs)
        return value if constant.index is None else value[constant.index]

    def _real(self, leaf: Any) -> Any:
        """Return the values of a fake tensor that holds constants; anything else as it is."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        constant = self._constants[leaf]
        if isinstance(constant, _Constant):
            constant = self._constants[leaf] = self._compute(constant).detach()
        return constant
