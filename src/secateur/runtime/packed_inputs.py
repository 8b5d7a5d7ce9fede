"""Several inputs of a network as one tensor.

Everything works on one tensor for each batch. Several inputs are joined along their channels if
they differ in nothing else, and otherwise as values `[image, value]`. A network that takes them
runs through `graph.forward.with_inputs`, which takes the tensor apart again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.runtime.errors import UsageError

Passing = Literal["arguments", "keywords", "list", "dict"]
"""`network(a, b)`, `network(name=a, …)`, `network([a, b])` or `network({"name": a, …})`."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a network, and how they are passed to it."""

    shapes: tuple[Shape, ...]
    """Shape of each input without its first axis, that of images."""
    passing: Passing = "arguments"
    names: tuple[str, ...] = ()
    """Name of each input, where they are passed by name."""

    @property
    def packed_shape(self) -> Shape:
        """The shape of the packed tensor without its first axis."""
        if self._has_channels:
            return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])
        return (sum(map(math.prod, self.shapes)),)

    @property
    def _has_channels(self) -> bool:
        """Whether the inputs have the same axes behind their channels."""
        return all(shape and shape[1:] == self.shapes[0][1:] for shape in self.shapes)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the inputs of a batch, each `[image, …]`, as one tensor.

        Raises `UsageError` if they have other shapes.
        """
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        if shapes != self.shapes or len({len(tensor) for tensor in tensors}) > 1:
            raise UsageError(
                f"the inputs must be {describe(self.shapes)} for each image; got "
                f"{' and '.join(str(list(tensor.shape)) for tensor in tensors)}"
            )
        if self._has_channels:
            return torch.cat(list(tensors), dim=1)
        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs in a packed tensor."""
        if self._has_channels:
            return tuple(packed.split([shape[0] for shape in self.shapes], dim=1))
        parts = packed.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(map(_reshaped, parts, self.shapes))

    def picture(self, packed: Tensor) -> Tensor:
        """Return the input that looks most like pictures: the first of those with most axes."""
        return max(self.unpack(packed), key=lambda tensor: tensor.ndim)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and the named arguments with which a network gets its inputs."""
        if self.passing == "arguments":
            return tuple(tensors), {}
        if self.passing == "list":
            return (list(tensors),), {}
        named = dict(zip(self.names, tensors, strict=True))
        return ((named,), {}) if self.passing == "dict" else ((), named)

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the inputs among the arguments of a call; raise `UsageError` if it has others."""
        values: Sequence[Any] = args
        if self.passing in ("keywords", "dict"):
            named = args[0] if args and self.passing == "dict" else kwargs
            known = isinstance(named, Mapping) and set(named) == set(self.names)
            values = [named[name] for name in self.names] if known else ()
        elif self.passing == "list" and len(args) == 1 and isinstance(args[0], list | tuple):
            values = args[0]
        if len(values) != len(self.shapes) or not all(isinstance(v, Tensor) for v in values):
            raise UsageError(f"the network takes {len(self.shapes)} tensors: {self._call()}")
        return tuple(values)

    def _call(self) -> str:
        """Return the call with which the network gets its inputs, in words."""
        shapes = [f"[image, {', '.join(map(str, shape))}]" for shape in self.shapes]
        if self.passing in ("arguments", "list"):
            listed = ", ".join(shapes)
            return f"network({listed})" if self.passing == "arguments" else f"network([{listed}])"
        pairs = zip(self.names, shapes, strict=True)
        if self.passing == "keywords":
            return f"network({', '.join(f'{name}={shape}' for name, shape in pairs)})"
        return f"network({{{', '.join(f'{name!r}: {shape}' for name, shape in pairs)}}})"


def _reshaped(part: Tensor, shape: Shape) -> Tensor:
    if len(shape) == 1:
        return part
    return part.unflatten(1, shape) if shape else part[:, 0]


def describe(shapes: Sequence[Shape]) -> str:
    """Return the shapes of several inputs in words."""
    return " and ".join(str(list(shape)) for shape in shapes)


@dataclass(frozen=True)
class Parameters:
    """What a network's call takes."""

    needed: tuple[str, ...] = ("images",)
    """Positional parameters without a default."""
    positional: tuple[str, ...] = ("images",)
    """All positional parameters."""
    is_open: bool = False
    """Whether there may be any number of positional arguments."""
    names: frozenset[str] = frozenset()
    """All that can be passed by name."""

    def passing_of(self, inputs: Sequence[object] | Mapping[str, object]) -> Passing:
        """Return how several inputs are passed."""
        if isinstance(inputs, Mapping):
            return "keywords" if self.names.issuperset(inputs) else "dict"
        takes_all = self.is_open or len(inputs) <= len(self.positional)
        return "arguments" if takes_all and len(self.needed) <= len(inputs) else "list"


def parameters_of(network: Any, forward: Callable[..., Any] | None = None) -> Parameters:
    """Return what a network's call takes, or what `forward(network, …)` takes behind it."""
    try:
        signature = inspect.signature(network.forward if forward is None else forward)
    except (TypeError, ValueError):
        return Parameters()
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if forward is not None:
        positional = positional[1:]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return Parameters(
        tuple(p.name for p in positional if p.default is p.empty),
        tuple(p.name for p in positional),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
        frozenset(p.name for p in (*positional, *named) if p.kind is not p.POSITIONAL_ONLY),
    )


def read_inputs(example: object, parameters: Parameters) -> tuple[Tensor, Inputs | None]:
    """Return a batch for a network as one tensor, and the inputs in it if there are several.

    `example` is a tensor, or a sequence or a mapping of tensors `[image, …]`. Raises `UsageError`
    for anything else.
    """
    if isinstance(example, Tensor):
        return example, None
    parts: Sequence[object] = ()
    if isinstance(example, Mapping):
        parts = list(example.values())
    elif isinstance(example, list | tuple):
        parts = example
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if not tensors or len(tensors) < len(parts):
        raise UsageError(
            "example must be a tensor [image, channel, …], or a tuple or a dict of several inputs, "
            f"not {type(example).__name__}"
        )
    for tensor in tensors:
        if not tensor.is_floating_point() or not tensor.ndim:
            raise UsageError(
                f"each input must be floating-point [image, …], not {list(tensor.shape)} of "
                f"{tensor.dtype}: make it from one in forward=, "
                "lambda model, images, numbers: model(images, numbers.long())"
            )
    assert isinstance(example, Mapping | Sequence)
    names = tuple(map(str, example)) if isinstance(example, Mapping) else ()
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
    inputs = Inputs(shapes, parameters.passing_of(example), names)
    return inputs.pack(tensors), inputs
