"""Rules of operations that join, split, reorder and reshape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx.node import Node

from secateur.graph.channel_ids import Axes, Count, Ids
from secateur.graph.network_graph import argument, first_input, position_of, shape_of
from secateur.graph.propagation import ChannelPropagation, fixed_axes


def concatenate(propagation: ChannelPropagation, node: Node) -> Axes:
    """Concatenation joins the channels of several values."""
    sources = [source for source in node.args[0] if isinstance(source, Node)]  # type: ignore[union-attr]
    # An empty tensor of another rank may be among them, and adds nothing.
    sources = [source for source in sources if len(shape_of(source)) == _rank(node)]
    joined_dim = argument(node, "dim", 0) % _rank(node)
    result: list[Ids | None] = []
    for dim in range(_rank(node)):
        pieces = [propagation.axes[source][dim] for source in sources]
        known = [ids for ids in pieces if ids is not None]
        if not known:
            result.append(None)
        elif dim == joined_dim:
            result.append(
                np.concatenate(
                    [
                        propagation.new_frozen_ids(
                            shape_of(source)[dim], "a constant or an input of the network"
                        )
                        if ids is None
                        else ids
                        for ids, source in zip(pieces, sources, strict=True)
                    ]
                )
            )
        else:
            for ids in pieces:
                if ids is not known[0]:
                    propagation.couple(known[0], ids, "joined with a value of fixed size")
            result.append(known[0])
    return tuple(result)


def _rank(node: Node) -> int:
    return len(shape_of(node))


def stack(propagation: ChannelPropagation, node: Node) -> Axes:
    """Stacking couples its inputs and adds a dimension."""
    sources = [source for source in node.args[0] if isinstance(source, Node)]  # type: ignore[union-attr]
    first, *rest = (propagation.axes[source] for source in sources)
    for other in rest:
        for one, ids in zip(first, other, strict=True):
            propagation.couple(one, ids, "stacked on a value of fixed size")
    dim = argument(node, "dim", 0) % _rank(node)
    return (*first[:dim], None, *first[dim:])


def permute(propagation: ChannelPropagation, node: Node) -> Axes:
    """Permuting reorders the dimensions."""
    axes = propagation.axes[first_input(node)]
    return tuple(axes[dim] for dim in argument(node, "dims"))


def transpose(propagation: ChannelPropagation, node: Node) -> Axes:
    """Transposing swaps two dimensions."""
    axes = list(propagation.axes[first_input(node)])
    one, other = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


def reverse(propagation: ChannelPropagation, node: Node) -> Axes:
    """Reversing the dimensions, as transposing a matrix does."""
    return propagation.axes[first_input(node)][::-1]


def squeeze(propagation: ChannelPropagation, node: Node) -> Axes:
    """Squeezing drops dimensions of size 1, whose channel is frozen."""
    source = first_input(node)
    axes, shape = propagation.axes[source], shape_of(source)
    dims = argument(node, "dim")
    chosen = range(len(axes)) if dims is None else dims if isinstance(dims, list) else [dims]
    dropped = {dim % len(axes) for dim in chosen if shape[dim] == 1}
    propagation.freeze((axes[dim] for dim in dropped), "a single channel")
    if dims is None:
        reason = "two channels must stay where a squeeze() drops a single one"
        propagation.keep_two((ids for ids in axes if ids is not None), reason)
    return tuple(ids for dim, ids in enumerate(axes) if dim not in dropped)


def unsqueeze(propagation: ChannelPropagation, node: Node) -> Axes:
    """Unsqueezing adds a dimension of size 1."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim") % _rank(node)
    return (*axes[:dim], None, *axes[dim:])


def select(propagation: ChannelPropagation, node: Node) -> Axes:
    """Selecting one index drops a dimension, whose channels are frozen."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim") % len(axes)
    propagation.freeze((axes[dim],), "a channel picked by its number in the network's code")
    return (*axes[:dim], *axes[dim + 1 :])


def unbind(propagation: ChannelPropagation, node: Node) -> list[Axes]:
    """Unbinding drops a dimension, whose channels are frozen."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim", 0) % len(axes)
    propagation.freeze((axes[dim],), "channels picked one by one in the network's code")
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in node.meta["val"]]


def split(propagation: ChannelPropagation, node: Node) -> list[Axes]:
    """Splitting cuts a dimension into pieces of equal size, or of given sizes."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim", 0) % len(axes)
    ids = axes[dim]
    if ids is None:
        return [axes for _ in node.meta["val"]]
    sizes = [int(piece.shape[dim]) for piece in node.meta["val"]]
    starts = np.cumsum([0, *sizes])
    pieces = [ids[start:end] for start, end in itertools.pairwise(starts)]
    index = next((i for i in (position_of(node, n) for n in _SIZES) if i >= 0), None)
    if index is None or isinstance(node.args[index], int):
        if len(set(sizes)) > 1:
            return propagation.freeze_inputs(node, "split into pieces of different size")  # type: ignore[no-any-return]
        propagation.couple_rows(np.stack(pieces, axis=1))
    if index is not None:
        one_size = isinstance(node.args[index], int)
        propagation.resizes[node] = lambda count: {
            index: count(pieces[0], sizes[0])
            if one_size
            else [count(piece, len(piece)) for piece in pieces]
        }
    return [(*axes[:dim], piece, *axes[dim + 1 :]) for piece in pieces]


_SIZES = ("split_size", "split_sizes")


def slice_(propagation: ChannelPropagation, node: Node) -> Axes:
    """Slicing keeps a range of a dimension."""
    source = first_input(node)
    axes = propagation.axes[source]
    dim = argument(node, "dim", 0) % len(axes)
    ids = axes[dim]
    if ids is None:
        return axes
    size = len(ids)
    start, end = argument(node, "start"), argument(node, "end")
    start, end, step = slice(start, end, argument(node, "step", 1)).indices(size)
    if step != 1:
        return propagation.freeze_inputs(node, "every n-th channel, in the network's code")  # type: ignore[no-any-return]
    head, chosen = ids[:start], ids[start:end]
    propagation.covers.append(chosen)
    if start == 0 and end == size:
        return axes

    def resize(count: Count) -> dict[int, int]:
        first = count(head, start)
        return {
            position_of(node, "start"): first,
            position_of(node, "end"): first + count(chosen, end - start),
        }

    propagation.resizes[node] = resize
    return (*axes[:dim], chosen, *axes[dim + 1 :])


def pad(propagation: ChannelPropagation, node: Node) -> Axes:
    """Padding adds constants before and after; channels of padding are frozen."""
    axes = list(propagation.axes[first_input(node)])
    amounts = list(argument(node, "pad"))
    for i in range(0, len(amounts), 2):
        dim = len(axes) - 1 - i // 2
        before, after = amounts[i : i + 2]
        ids = axes[dim]
        if ids is None or before == after == 0:
            continue
        if min(before, after) < 0 or argument(node, "mode", "constant") != "constant":
            reason = "cropped or padded by numbers in the network's code"
            return propagation.freeze_inputs(node, reason)  # type: ignore[no-any-return]
        reason = "padded with channels of zeros in the network's code"
        axes[dim] = np.concatenate(
            [
                propagation.new_frozen_ids(before, reason),
                ids,
                propagation.new_frozen_ids(after, reason),
            ]
        )
    return tuple(axes)


def flatten(propagation: ChannelPropagation, node: Node) -> Axes:
    """Flattening makes several dimensions one."""
    return _regrouped(propagation, node)


def unflatten(propagation: ChannelPropagation, node: Node) -> Axes:
    """Unflattening makes one dimension several."""
    axes = _regrouped(propagation, node)
    index = position_of(node, "sizes")
    first = argument(node, "dim") % _rank(first_input(node))
    record_sizes(propagation, node, index, axes[first : first + len(argument(node, "sizes"))])
    return axes


def reshape(propagation: ChannelPropagation, node: Node) -> Axes:
    """Reshaping keeps the values and their order."""
    axes = _regrouped(propagation, node)
    index = position_of(node, "size" if position_of(node, "size") >= 0 else "shape")
    if index >= 0:
        record_sizes(propagation, node, index, axes)
    return axes


def record_sizes(propagation: ChannelPropagation, node: Node, index: int, axes: Axes) -> None:
    """Record which of the sizes in an argument are numbers of channels."""
    shape = node.args[index]
    assert isinstance(shape, list | tuple)
    literal = [
        dim
        for dim, (size, ids) in enumerate(zip(shape, axes, strict=True))
        if ids is not None and isinstance(size, int) and size != -1
    ]

    def resize(count: Count) -> dict[int, Any]:
        sizes = list(shape)
        for dim in literal:
            sizes[dim] = count(axes[dim], 0)
        return {index: sizes}

    if literal:
        propagation.resizes[node] = resize


def _regrouped(propagation: ChannelPropagation, node: Node) -> Axes:
    """Return axes after a reshape; dimensions are matched from the left by products of sizes."""
    source = first_input(node)
    axes, before, after = propagation.axes[source], shape_of(source), shape_of(node)
    if all(ids is None for ids in axes):
        return (None,) * len(after)
    result: list[Ids | None] = [None] * len(after)
    for old_dims, new_dims in _segments(before, after):
        new_axes = _regroup(
            propagation,
            [(axes[dim], before[dim]) for dim in old_dims],
            [after[dim] for dim in new_dims],
        )
        if new_axes is None:
            shape = ", ".join(
                "batch" if s % propagation.graph.images == 0 else str(s) for s in after
            )
            return propagation.freeze_inputs(node, f"reshaped to [{shape}], which mixes dimensions")  # type: ignore[no-any-return]
        for dim, ids in zip(new_dims, new_axes, strict=True):
            result[dim] = ids
    return tuple(result)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of dimensions with the same number of values in both shapes."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old_dims, new_dims = [i], [j]
        old_size, new_size = before[i], after[j]
        while old_size != new_size:
            if old_size < new_size:
                i += 1
                old_dims.append(i)
                old_size *= before[i]
            else:
                j += 1
                new_dims.append(j)
                new_size *= after[j]
        segments.append((old_dims, new_dims))
        i, j = i + 1, j + 1
    if not segments:
        return [(list(range(len(before))), list(range(len(after))))]
    segments[-1][0].extend(range(i, len(before)))  # dimensions of size 1 are left over
    segments[-1][1].extend(range(j, len(after)))
    return segments


def _ids(before: list[tuple[Ids | None, int]], dim: int) -> Ids:
    ids = before[dim][0]
    assert ids is not None
    return ids


def _regroup(
    propagation: ChannelPropagation,
    before: list[tuple[Ids | None, int]],
    after: list[int],
) -> list[Ids | None] | None:
    """Return the ids along the new dimensions of one segment; None if they can't be known.

    Channels that are split over several new dimensions are followed along the largest one, and
    coupled over the others: `[2, 58]` becomes 58 pairs.
    """
    for ids, size in before:
        if size == 1 and len(before) > 1:
            propagation.freeze((ids,), "a single channel")
    tracked = [
        dim
        for dim, (ids, size) in enumerate(before)
        if ids is not None and (len(before) == 1 or size > 1)
    ]
    if len(before) > 1 or len(after) > 1:
        copies = [dim for dim in tracked if propagation.are_copies(_ids(before, dim))]
        propagation.freeze((_ids(before, dim) for dim in copies), "copies that are reshaped")
        tracked = [dim for dim in tracked if dim not in copies]
    wide = [dim for dim, size in enumerate(after) if size > 1]
    result: list[Ids | None] = [None] * len(after)
    if not tracked:
        return result
    if len(tracked) > 1 or any(size % propagation.graph.images == 0 for _, size in before):
        return None
    (tracked_dim,) = tracked
    ids = _ids(before, tracked_dim)
    if not wide:
        propagation.freeze((ids,), "a single channel")
        return result
    index = np.arange(len(ids)).reshape(
        [-1 if dim == tracked_dim else 1 for dim in range(len(before))]
    )
    grid = ids[np.broadcast_to(index, [size for _, size in before])].reshape(after)

    def rows(dim: int) -> Ids:
        size = grid.shape[dim]
        return np.moveaxis(grid, dim, 0).reshape(size, math.prod(grid.shape) // size)

    whole = (dim for dim in wide if (rows(dim) == rows(dim)[:, :1]).all())
    chosen = next(whole, max(wide, key=lambda dim: grid.shape[dim]))
    result[chosen] = propagation.couple_rows(rows(chosen))
    return result


def pixel_shuffle(propagation: ChannelPropagation, node: Node) -> Axes:
    """Pixel shuffle turns groups of channels into positions."""
    axes = propagation.axes[first_input(node)]
    ids = axes[-3]
    propagation.freeze(axes[-2:], "shuffled as if they were positions")
    factor = argument(node, "upscale_factor") ** 2
    kept = None if ids is None else propagation.couple_rows(ids.reshape(-1, factor))
    return (*axes[:-3], kept, None, None)


def pixel_unshuffle(propagation: ChannelPropagation, node: Node) -> Axes:
    """Pixel unshuffle turns positions into channels."""
    axes = propagation.axes[first_input(node)]
    ids = axes[-3]
    propagation.freeze(axes[-2:], "shuffled as if they were positions")
    factor = argument(node, "downscale_factor") ** 2
    return (*axes[:-3], None if ids is None else np.repeat(ids, factor), None, None)


def channel_shuffle(propagation: ChannelPropagation, node: Node) -> Axes:
    """Channel shuffle interleaves groups, and couples the channels that are interleaved."""
    axes = propagation.axes[first_input(node)]
    ids = axes[1]
    if ids is None:
        return axes
    groups = argument(node, "groups")
    rows = propagation.couple_rows(ids.reshape(groups, -1).T)
    return (axes[0], np.repeat(rows, groups), *axes[2:])


def glu(propagation: ChannelPropagation, node: Node) -> Axes:
    """A gated linear unit multiplies one half by the sigmoid of the other."""
    axes = propagation.axes[first_input(node)]
    dim = argument(node, "dim", -1) % len(axes)
    ids = axes[dim]
    half = None if ids is None else propagation.couple_rows(ids.reshape(2, -1).T)
    return (*axes[:dim], half, *axes[dim + 1 :])


def windows(propagation: ChannelPropagation, node: Node) -> Axes:
    """Unfolding adds sliding windows over positions as a last dimension."""
    axes = propagation.axes[first_input(node)]
    propagation.freeze((axes[argument(node, "dimension")],), "unfolded as if they were positions")
    return (*axes, None)


def fold(propagation: ChannelPropagation, node: Node) -> Axes:
    """col2im is the other way round: the windows of each channel become its positions."""
    axes = propagation.axes[first_input(node)]
    ids = axes[1]
    channels = int(shape_of(node)[1])
    kept = None if ids is None else propagation.couple_rows(ids.reshape(channels, -1))
    return (axes[0], kept, None, None)


def patches(propagation: ChannelPropagation, node: Node) -> Axes:
    """im2col lays every channel, with its window of positions, along one dimension."""
    axes = propagation.axes[first_input(node)]
    ids = axes[1]
    if ids is None:
        return fixed_axes(node)  # type: ignore[no-any-return]
    return (axes[0], np.repeat(ids, int(shape_of(node)[1]) // len(ids)), None)
