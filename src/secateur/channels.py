"""Channel ids on their way through the graph.

Every axis of every parameter gets ids of its own; each operation has a rule that says how the ids
of what it reads become those of what it writes, which ids it ties and which it freezes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.fx.node import Node

from secateur.graph import NetworkGraph, operation_name

Ids = npt.NDArray[np.int64]
Axes = tuple[Ids | None, ...]
"""Channel ids along each dimension of a tensor; None where a dimension holds no channels."""


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer that sums over channels of a group."""

    layer: str
    weight: str
    node: Node


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer as it is counted."""

    name: str
    weight: str
    positions: int
    """Output positions an image at which the kernel is applied."""
    node: Node


Rule = Callable[["ChannelSpread", Node], Axes]


class ChannelSpread:
    """Channel ids on their way through the graph, and what was learnt about them."""

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self.axes: dict[Node, Axes] = {}
        self.layers: list[Layer] = []
        self.readers: list[Reader] = []
        self.summed: list[Ids] = []
        """Channels that a sum of two feature maps ties."""
        self._count = 0
        self._ties: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, str]] = []

    def visit(self, node: Node) -> None:
        """Works out the axes of one node's value."""
        value = node.meta.get("val")
        if node.op == "placeholder" and node in self.graph.tensor_names:
            assert isinstance(value, Tensor)
            self.axes[node] = tuple(self.fresh(int(size)) for size in value.shape)
        elif node is self.graph.image:
            self.axes[node] = self.opaque(node, "read from the network's input", dims=[1])
        elif node.op == "call_function" and (
            isinstance(value, Tensor) or operation_name(node) in _POOLING
        ):
            rule = RULES.get(operation_name(node))
            self.axes[node] = rule(self, node) if rule else self._without_rule(node)
        elif node.op == "call_function" and not isinstance(value, torch.SymInt | int):
            self._without_rule(node)
            self.axes[node] = ()
        elif isinstance(value, Tensor):
            self.axes[node] = self.opaque(node, "a constant of the network")

    def fresh(self, size: int) -> Ids:
        """New channel ids."""
        self._count += size
        return np.arange(self._count - size, self._count, dtype=np.int64)

    def tie(self, one: Ids | None, other: Ids | None) -> None:
        """States that two axes hold the same channels, index by index."""
        if one is not None and other is not None:
            self._ties.append((one, other))

    def freeze(self, axes: Iterable[Ids | None], reason: str) -> None:
        """States that no channel of these axes can be cut."""
        self._frozen.extend((ids, reason) for ids in axes if ids is not None)

    def opaque(self, node: Node, reason: str, dims: Iterable[int] | None = None) -> Axes:
        """Axes of a value about whose channels nothing is known but that they must stay.

        Without `dims` every dimension is taken to hold channels.
        """
        shape = node.meta["val"].shape
        chosen = set(range(len(shape)) if dims is None else dims)
        axes = tuple(
            self.fresh(size) if isinstance(size, int) and dim in chosen else None
            for dim, size in enumerate(shape)
        )
        self.freeze(axes, reason)
        return axes

    def frozen_here(self, node: Node, reason: str, dims: Iterable[int] | None = None) -> Axes:
        """Freezes all that the node reads; what it writes must stay as well."""
        for source in node.all_input_nodes:
            self.freeze(self.axes.get(source, ()), reason)
        if not isinstance(node.meta.get("val"), Tensor):
            return ()
        return self.opaque(node, reason, dims)

    def _without_rule(self, node: Node) -> Axes:
        return self.frozen_here(node, f"no rule for the operation {operation_name(node)!r}")

    @property
    def size(self) -> int:
        """Number of channel ids given out."""
        return self._count

    def roots(self) -> Ids:
        """`[id]`: the smallest id that each id is tied to, directly or through others."""
        parent = np.arange(self._count, dtype=np.int64)
        if not self._ties:
            return parent
        one = np.concatenate([a for a, _ in self._ties])
        other = np.concatenate([b for _, b in self._ties])
        while True:
            low, high = np.sort(np.stack([parent[one], parent[other]]), axis=0)
            if (low == high).all():
                return parent
            np.minimum.at(parent, high, low)
            while not (parent == parent[parent]).all():
                parent = parent[parent]

    def reasons(self, roots: Ids) -> dict[int, str]:
        """`{root: the first reason why the channel must stay}`."""
        found: dict[int, str] = {}
        for ids, reason in self._frozen:
            for channel in np.unique(roots[ids]).tolist():
                found.setdefault(channel, reason)
        return found


def feature_map(node: Node) -> Node:
    """The value itself, or what it was before pooling or flattening left it without positions."""
    found = node
    while not _has_positions(found):
        if operation_name(found) not in _FLATTENING | _POOLING | _COPYING:
            return node
        found = first_input(found)
    return found


def _has_positions(node: Node) -> bool:
    value = node.meta["val"]
    shape = value.shape if isinstance(value, Tensor) else value[0].shape
    return len(shape) > 2 and math.prod(int(size) for size in shape[2:]) > 1


def first_input(node: Node, index: int = 0) -> Node:
    """The node at a position among a node's arguments, by default the first."""
    source = node.args[index]
    assert isinstance(source, Node)
    return source


def _argument(node: Node, index: int, name: str, default: object) -> object:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


# --- rules: one function an operation family, axes of the inputs in, axes of the value out --------


def _layer(spread: ChannelSpread, node: Node, weight: Node, positions: int) -> Layer:
    name = spread.graph.tensor_names[weight]
    layer = Layer(name.rpartition(".")[0], name, positions, node)
    spread.layers.append(layer)
    return layer


def _positions(spread: ChannelSpread, *sizes: Sequence[int | torch.SymInt]) -> int:
    """How many positions an image has in dimensions of these sizes, the batch among them."""
    (batch, *_) = spread.graph.image.meta["val"].shape
    return math.prod(_traced(size) for part in sizes for size in part) // _traced(batch)


def _traced(size: int | torch.SymInt) -> int:
    """The size as it was in the example batch."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    assert isinstance(hint, int)
    return hint


def _convolution(spread: ChannelSpread, node: Node) -> Axes:
    images, weight = first_input(node), first_input(node, 1)
    bias = _argument(node, 2, "bias", None)
    groups = _argument(node, 6, "groups", 1)
    if weight not in spread.graph.tensor_names:
        return spread.frozen_here(node, "a convolution whose kernel is computed in the forward")
    shape = node.meta["val"].shape
    _layer(spread, node, weight, _positions(spread, shape[:1], shape[2:]))
    spread.freeze(spread.axes[images][2:], "convolved over as if they were positions")
    read, kernel = spread.axes[images][1], spread.axes[weight]
    if groups == 1:
        spread.tie(read, kernel[1])
        layer = spread.layers[-1]
        spread.readers.append(Reader(layer.name, layer.weight, node))
    elif read is not None and kernel[0] is not None and groups == len(read) == len(kernel[0]):
        spread.tie(read, kernel[0])  # depthwise: a channel passes through
    else:
        spread.freeze((read, kernel[0]), "a grouped convolution")
    if isinstance(bias, Node):
        spread.tie(kernel[0], spread.axes[bias][0])
    return (None, kernel[0], *(None for _ in shape[2:]))


def _transposed(spread: ChannelSpread, node: Node) -> Axes:
    """Counted, where its kernel is a parameter, but not cut."""
    images, weight = first_input(node), first_input(node, 1)
    if weight in spread.graph.tensor_names:
        shape = images.meta["val"].shape
        _layer(spread, node, weight, _positions(spread, shape[:1], shape[2:]))
    return spread.frozen_here(node, "a transposed convolution")


def _linear(spread: ChannelSpread, node: Node) -> Axes:
    inputs, weight = first_input(node), first_input(node, 1)
    bias = _argument(node, 2, "bias", None)
    if weight not in spread.graph.tensor_names:
        return spread.frozen_here(node, "a linear layer whose kernel is computed in the forward")
    shape = node.meta["val"].shape
    layer = _layer(spread, node, weight, _positions(spread, shape[:-1]))
    spread.freeze(spread.axes[inputs][1:-1], "positions to a linear layer over another dimension")
    spread.tie(spread.axes[inputs][-1], spread.axes[weight][1])
    spread.readers.append(Reader(layer.name, layer.weight, node))
    if isinstance(bias, Node):
        spread.tie(spread.axes[weight][0], spread.axes[bias][0])
    return (*spread.axes[inputs][:-1], spread.axes[weight][0])


def _batch_norm(spread: ChannelSpread, node: Node) -> Axes:
    axes = spread.axes[first_input(node)]
    for source in node.args[1:5]:
        if isinstance(source, Node):
            spread.tie(axes[1], spread.axes[source][0])
    return axes


def _keep(spread: ChannelSpread, node: Node) -> Axes:
    return spread.axes[first_input(node)]


def _pool(spread: ChannelSpread, node: Node) -> Axes:
    axes = spread.axes[first_input(node)]
    spread.freeze(axes[2:], "pooled over as if they were positions")
    return (*axes[:2], *(None for _ in axes[2:]))


def _item(spread: ChannelSpread, node: Node) -> Axes:
    """One of several values of an operation: of a pooling the largest values, or where they are."""
    axes = spread.axes[first_input(node)]
    return axes or spread.frozen_here(node, "one of several values of an operation without a rule")


def _elementwise(spread: ChannelSpread, node: Node) -> Axes:
    """Ties the operands along every dimension that is not broadcast."""
    rank = len(node.meta["val"].shape)
    result: list[Ids | None] = [None] * rank
    for source in node.all_input_nodes:
        axes = spread.axes.get(source, ())
        for offset, ids in enumerate(reversed(axes), start=1):
            if ids is None or (len(ids) == 1 and node.meta["val"].shape[-offset] != 1):
                continue
            spread.tie(result[-offset], ids)
            result[-offset] = ids if result[-offset] is None else result[-offset]
    return tuple(result)


def _sum(spread: ChannelSpread, node: Node) -> Axes:
    axes = _elementwise(spread, node)
    parts = [spread.axes.get(source, ()) for source in node.all_input_nodes]
    if len(parts) == 2 and all(len(part) == len(axes) for part in parts):
        spread.summed.extend(ids for ids in axes if ids is not None)
    return axes


def _mean(spread: ChannelSpread, node: Node) -> Axes:
    axes = spread.axes[first_input(node)]
    dims = _argument(node, 1, "dim", None)
    keepdim = _argument(node, 2, "keepdim", False)
    if not isinstance(dims, list | tuple):
        return spread.frozen_here(node, "a mean over every dimension")
    reduced = {int(dim) % len(axes) for dim in dims if isinstance(dim, int)}
    if any(axes[dim] is not None for dim in reduced):
        return spread.frozen_here(node, "a mean over channels")
    if keepdim:
        return tuple(None if dim in reduced else ids for dim, ids in enumerate(axes))
    return tuple(ids for dim, ids in enumerate(axes) if dim not in reduced)


def _concatenate(spread: ChannelSpread, node: Node) -> Axes:
    sources = node.args[0]
    assert isinstance(sources, list | tuple)
    parts = [spread.axes[source] for source in sources if isinstance(source, Node)]
    dim = _argument(node, 1, "dim", 0)
    assert isinstance(dim, int)
    dim %= len(parts[0])
    joined = [part[dim] for part in parts]
    for part in parts[1:]:
        for other, (one, ids) in enumerate(zip(parts[0], part, strict=True)):
            if other != dim:
                spread.tie(one, ids)
    if all(ids is None for ids in joined):
        return parts[0]
    known = [ids for ids in joined if ids is not None]
    if len(known) != len(joined):
        return spread.frozen_here(node, "concatenated with something other than channels")
    return (*parts[0][:dim], np.concatenate(known), *parts[0][dim + 1 :])


def _flatten(spread: ChannelSpread, node: Node) -> Axes:
    first, last = _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1)
    assert isinstance(first, int)
    assert isinstance(last, int)
    return _flattened(spread, node, first, last)


def _flattened(spread: ChannelSpread, node: Node, first: int, last: int) -> Axes:
    axes = spread.axes[first_input(node)]
    shape = first_input(node).meta["val"].shape
    first, last = first % len(axes), last % len(axes)
    tracked = [dim for dim in range(first, last + 1) if axes[dim] is not None]
    if not tracked:
        return (*axes[:first], None, *axes[last + 1 :])
    if len(tracked) > 1 or not all(isinstance(size, int) for size in shape[first : last + 1]):
        return spread.frozen_here(node, "flattened together with the batch or other channels")
    index = np.arange(shape[tracked[0]]).reshape(
        [-1 if dim == tracked[0] else 1 for dim in range(first, last + 1)]
    )
    ids = axes[tracked[0]]
    assert ids is not None
    repeated = ids[np.broadcast_to(index, tuple(shape[first : last + 1])).reshape(-1)]
    return (*axes[:first], repeated, *axes[last + 1 :])


def _reshape(spread: ChannelSpread, node: Node) -> Axes:
    shape = node.args[1]
    assert isinstance(shape, list | tuple)
    batch_sizes = [str(value.meta["val"].shape[0]) for value in (node, first_input(node))]
    if len(shape) == 2 and shape[1] == -1 and len(set(batch_sizes)) == 1:
        return _flattened(spread, node, 1, -1)
    sizes = ", ".join("batch" if isinstance(size, Node) else str(size) for size in shape)
    return spread.frozen_here(node, f"reshaped to the fixed size [{sizes}] in the network's code")


def _slice(spread: ChannelSpread, node: Node) -> Axes:
    axes = spread.axes[first_input(node)]
    dim = _argument(node, 1, "dim", 0)
    assert isinstance(dim, int)
    if axes[dim] is None or node.meta["val"].shape == first_input(node).meta["val"].shape:
        return axes
    reason = "sliced by channel numbers in the network's code"
    return spread.frozen_here(node, reason, _tracked(axes))


def _pad(spread: ChannelSpread, node: Node) -> Axes:
    axes = spread.axes[first_input(node)]
    amounts = node.args[1]
    assert isinstance(amounts, list | tuple)
    padded = {len(axes) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    if any(axes[dim] is not None for dim in padded):
        reason = "padded with channels of zeros in the network's code"
        return spread.frozen_here(node, reason, _tracked(axes))
    return axes


def _tracked(axes: Axes) -> list[int]:
    return [dim for dim, ids in enumerate(axes) if ids is not None]


_COPYING = {
    *("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias"),
    *("to", "_to_copy", "getitem"),
}
_KEEPING = {
    *("relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh"),
    *("leaky_relu", "elu", "selu", "softplus", "mish", "clamp", "clamp_min", "neg", "abs", "exp"),
    *_COPYING,
}
_POOLING = {
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
}
_FLATTENING = {"flatten", "view", "reshape", "mean"}

RULES: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "linear": _linear,
    "batch_norm": _batch_norm,
    **dict.fromkeys(_KEEPING, _keep),
    "getitem": _item,
    **dict.fromkeys(_POOLING, _pool),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _elementwise),
    "mean": _mean,
    "cat": _concatenate,
    "flatten": _flatten,
    **dict.fromkeys(("view", "reshape"), _reshape),
    "slice": _slice,
    "pad": _pad,
    "constant_pad_nd": _pad,
}
"""ATen operation -> how channel ids pass through it."""
