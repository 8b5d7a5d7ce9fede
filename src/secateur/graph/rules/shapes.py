"""Rules of operations that join, part, reorder and reshape."""

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


def concatenate(spread: ChannelPropagation, node: Node) -> Axes:
    """Channels of several values behind one another."""
    sources = [source for source in node.args[0] if isinstance(source, Node)]  # type: ignore[union-attr]
    parts = [(spread.axes[s], shape_of(s)) for s in sources if len(shape_of(s)) == _rank(node)]
    dim = argument(node, "dim", 0) % _rank(node)
    result: list[Ids | None] = []
    for other in range(_rank(node)):
        ids = [axes[other] for axes, _ in parts]
        if other != dim:
            known = [each for each in ids if each is not None]
            for each in ids:
                if known and each is not known[0]:
                    spread.tie(known[0], each, "joined with a value of fixed size")
            result.append(known[0] if known else None)
        elif all(each is None for each in ids):
            result.append(None)
        else:
            result.append(
                np.concatenate(
                    [
                        spread.fixed(shape[dim], "a constant or an input of the network")
                        if each is None
                        else each
                        for each, (_, shape) in zip(ids, parts, strict=True)
                    ]
                )
            )
    return tuple(result)


def _rank(node: Node) -> int:
    return len(shape_of(node))


def stack(spread: ChannelPropagation, node: Node) -> Axes:
    """Several values along a new dimension."""
    sources = [source for source in node.args[0] if isinstance(source, Node)]  # type: ignore[union-attr]
    first, *rest = (spread.axes[source] for source in sources)
    for other in rest:
        for one, ids in zip(first, other, strict=True):
            spread.tie(one, ids, "stacked on a value of fixed size")
    dim = argument(node, "dim", 0) % _rank(node)
    return (*first[:dim], None, *first[dim:])


def permute(spread: ChannelPropagation, node: Node) -> Axes:
    """Another order of the dimensions."""
    axes = spread.axes[first_input(node)]
    return tuple(axes[dim] for dim in argument(node, "dims"))


def transpose(spread: ChannelPropagation, node: Node) -> Axes:
    """Two dimensions change places."""
    axes = list(spread.axes[first_input(node)])
    one, other = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


def reverse(spread: ChannelPropagation, node: Node) -> Axes:
    """The dimensions in reverse order, as for a matrix that is transposed."""
    return spread.axes[first_input(node)][::-1]


def squeeze(spread: ChannelPropagation, node: Node) -> Axes:
    """Dimensions of size 1 go."""
    source = first_input(node)
    axes, shape = spread.axes[source], shape_of(source)
    dims = argument(node, "dim")
    chosen = range(len(axes)) if dims is None else dims if isinstance(dims, list) else [dims]
    gone = {dim % len(axes) for dim in chosen if shape[dim] == 1}
    spread.freeze((axes[dim] for dim in gone), "a single channel")
    for ids in axes if dims is None else ():
        if ids is not None and len(ids) > 1:  # besides a frozen one, one of a group stays
            spread.freeze((ids[:1],), "two channels must stay where a squeeze() drops a single one")
            spread.written.append(ids[1:])
    return tuple(ids for dim, ids in enumerate(axes) if dim not in gone)


def unsqueeze(spread: ChannelPropagation, node: Node) -> Axes:
    """A new dimension of size 1."""
    axes = spread.axes[first_input(node)]
    dim = argument(node, "dim") % _rank(node)
    return (*axes[:dim], None, *axes[dim:])


def select(spread: ChannelPropagation, node: Node) -> Axes:
    """One index of a dimension, which goes."""
    axes = spread.axes[first_input(node)]
    dim = argument(node, "dim") % len(axes)
    spread.freeze((axes[dim],), "a channel picked by its number in the network's code")
    return (*axes[:dim], *axes[dim + 1 :])


def unbind(spread: ChannelPropagation, node: Node) -> list[Axes]:
    """Every index of a dimension, which goes, by itself."""
    axes = spread.axes[first_input(node)]
    dim = argument(node, "dim", 0) % len(axes)
    spread.freeze((axes[dim],), "channels picked one by one in the network's code")
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in node.meta["val"]]


def split(spread: ChannelPropagation, node: Node) -> list[Axes]:
    """Pieces of a dimension: as many of one size, or of given sizes."""
    axes = spread.axes[first_input(node)]
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
            return spread.refuse(node, "split into pieces of different size")  # type: ignore[no-any-return]
        spread.tie_rows(np.stack(pieces, axis=1))
    if index is not None:
        one_size = isinstance(node.args[index], int)
        spread.resizes[node] = lambda count: {
            index: count(pieces[0], sizes[0])
            if one_size
            else [count(piece, len(piece)) for piece in pieces]
        }
    return [(*axes[:dim], piece, *axes[dim + 1 :]) for piece in pieces]


_SIZES = ("split_size", "split_sizes")


def slice_(spread: ChannelPropagation, node: Node) -> Axes:
    """A range of a dimension."""
    source = first_input(node)
    axes = spread.axes[source]
    dim = argument(node, "dim", 0) % len(axes)
    ids = axes[dim]
    if ids is None:
        return axes
    size = len(ids)
    start, end = argument(node, "start"), argument(node, "end")
    start, end, step = slice(start, end, argument(node, "step", 1)).indices(size)
    if step != 1:
        return spread.refuse(node, "every so many channels, in the network's code")  # type: ignore[no-any-return]
    head, chosen = ids[:start], ids[start:end]
    spread.written.append(chosen)
    if start == 0 and end == size:
        return axes

    def resize(count: Count) -> dict[int, int]:
        first = count(head, start)
        return {
            position_of(node, "start"): first,
            position_of(node, "end"): first + count(chosen, end - start),
        }

    spread.resizes[node] = resize
    return (*axes[:dim], chosen, *axes[dim + 1 :])


def pad(spread: ChannelPropagation, node: Node) -> Axes:
    """Constant values before and behind; padded channels are there to stay."""
    axes = list(spread.axes[first_input(node)])
    amounts = list(argument(node, "pad"))
    for place in range(0, len(amounts), 2):
        dim = len(axes) - 1 - place // 2
        before, behind = amounts[place : place + 2]
        ids = axes[dim]
        if ids is None or before == behind == 0:
            continue
        if min(before, behind) < 0 or argument(node, "mode", "constant") != "constant":
            return spread.refuse(node, "cropped or padded by numbers in the network's code")  # type: ignore[no-any-return]
        reason = "padded with channels of zeros in the network's code"
        axes[dim] = np.concatenate(
            [spread.fixed(before, reason), ids, spread.fixed(behind, reason)]
        )
    return tuple(axes)


def flatten(spread: ChannelPropagation, node: Node) -> Axes:
    """Several dimensions become one."""
    return _regrouped(spread, node)


def unflatten(spread: ChannelPropagation, node: Node) -> Axes:
    """One dimension becomes several."""
    axes = _regrouped(spread, node)
    index = position_of(node, "sizes")
    first = argument(node, "dim") % _rank(first_input(node))
    _note_sizes(spread, node, index, axes[first : first + len(argument(node, "sizes"))])
    return axes


def reshape(spread: ChannelPropagation, node: Node) -> Axes:
    """Another shape for the same values, in the same order."""
    axes = _regrouped(spread, node)
    index = position_of(node, "size" if position_of(node, "size") >= 0 else "shape")
    if index >= 0:
        _note_sizes(spread, node, index, axes)
    return axes


def _note_sizes(spread: ChannelPropagation, node: Node, index: int, axes: Axes) -> None:
    """Notes which of the sizes in an argument are numbers of channels."""
    given = node.args[index]
    assert isinstance(given, list | tuple)
    literal = [
        dim
        for dim, (size, ids) in enumerate(zip(given, axes, strict=True))
        if ids is not None and isinstance(size, int) and size != -1
    ]

    def resize(count: Count) -> dict[int, Any]:
        sizes = list(given)
        for dim in literal:
            sizes[dim] = count(axes[dim], 0)
        return {index: sizes}

    if literal:
        spread.resizes[node] = resize


def _regrouped(spread: ChannelPropagation, node: Node) -> Axes:
    """Axes after a reshape: dimensions are matched from the left, by the product of their sizes."""
    source = first_input(node)
    axes, before, after = spread.axes[source], shape_of(source), shape_of(node)
    if all(ids is None for ids in axes):
        return (None,) * len(after)
    result: list[Ids | None] = [None] * len(after)
    for some, others in _segments(before, after):
        found = _regroup(
            spread, [(axes[dim], before[dim]) for dim in some], [after[d] for d in others]
        )
        if found is None:
            shape = ", ".join("batch" if s % spread.graph.images == 0 else str(s) for s in after)
            return spread.refuse(node, f"reshaped to [{shape}], which mixes dimensions")  # type: ignore[no-any-return]
        for dim, ids in zip(others, found, strict=True):
            result[dim] = ids
    return tuple(result)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions with the same number of values in both shapes."""
    sizes, new = list(before), list(after)
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(sizes) and j < len(new):
        some, others = [i], [j]
        one, other = sizes[i], new[j]
        while one != other:
            if one < other:
                i += 1
                some.append(i)
                one *= sizes[i]
            else:
                j += 1
                others.append(j)
                other *= new[j]
        segments.append((some, others))
        i, j = i + 1, j + 1
    if not segments:
        return [(list(range(len(sizes))), list(range(len(new))))]
    segments[-1][0].extend(range(i, len(sizes)))  # dimensions of size 1 are left over
    segments[-1][1].extend(range(j, len(new)))
    return segments


def _regroup(
    spread: ChannelPropagation,
    before: list[tuple[Ids | None, int]],
    after: list[int],
) -> list[Ids | None] | None:
    """Ids along the new dimensions of one segment; None where that can't be told.

    Where channels are spread over several new dimensions they are followed along the largest one,
    and tied over the others: `[2, 58]` becomes 58 pairs.
    """
    for ids, size in before:
        if size == 1 and len(before) > 1:
            spread.freeze((ids,), "a single channel")
    tracked = [
        place
        for place, (ids, size) in enumerate(before)
        if ids is not None and (len(before) == 1 or size > 1)
    ]
    wide = [place for place, size in enumerate(after) if size > 1]
    result: list[Ids | None] = [None] * len(after)
    if not tracked:
        return result
    if len(tracked) > 1 or any(size % spread.graph.images == 0 for _, size in before):
        return None
    (place,) = tracked
    ids = before[place][0]
    assert ids is not None
    if not wide:
        spread.freeze((ids,), "a single channel")
        return result
    index = np.arange(len(ids)).reshape(
        [-1 if other == place else 1 for other in range(len(before))]
    )
    grid = ids[np.broadcast_to(index, [size for _, size in before])].reshape(after)

    def rows(dim: int) -> Ids:
        size = grid.shape[dim]
        return np.moveaxis(grid, dim, 0).reshape(size, math.prod(grid.shape) // size)

    simple = (dim for dim in wide if (rows(dim) == rows(dim)[:, :1]).all())
    chosen = next(simple, max(wide, key=lambda dim: grid.shape[dim]))
    result[chosen] = spread.tie_rows(rows(chosen))
    return result


def expand(spread: ChannelPropagation, node: Node) -> Axes:
    """Dimensions of size 1 are repeated."""
    source = first_input(node)
    axes, before, after = spread.axes[source], shape_of(source), shape_of(node)
    missing = len(after) - len(before)
    result: list[Ids | None] = [None] * missing
    for ids, old, new in zip(axes, before, after[missing:], strict=True):
        if old == 1 and new != 1:
            spread.freeze((ids,), "one channel that is spread over others")
            ids = None
        result.append(ids)
    index = position_of(node, "size")
    if index >= 0:
        _note_sizes(spread, node, index, tuple(result))
    return tuple(result)


def repeat(spread: ChannelPropagation, node: Node) -> Axes:
    """Each dimension several times behind itself."""
    axes = spread.axes[first_input(node)]
    counts = list(argument(node, "repeats", argument(node, "dims")))
    counts = [1] * (len(axes) - len(counts)) + counts
    axes = (*(None for _ in range(len(counts) - len(axes))), *axes)
    if any(ids is not None and isinstance(n, Node) for ids, n in zip(axes, counts, strict=True)):
        return spread.refuse(node, "repeated once for each image")  # type: ignore[no-any-return]
    return tuple(
        None if ids is None else np.tile(ids, count)
        for ids, count in zip(axes, counts, strict=True)
    )


def pixel_shuffle(spread: ChannelPropagation, node: Node) -> Axes:
    """Groups of channels become positions."""
    axes = spread.axes[first_input(node)]
    ids = axes[-3]
    spread.freeze(axes[-2:], "shuffled as if they were positions")
    factor = argument(node, "upscale_factor") ** 2
    kept = None if ids is None else spread.tie_rows(ids.reshape(-1, factor))
    return (*axes[:-3], kept, None, None)


def pixel_unshuffle(spread: ChannelPropagation, node: Node) -> Axes:
    """Positions become channels."""
    axes = spread.axes[first_input(node)]
    ids = axes[-3]
    spread.freeze(axes[-2:], "shuffled as if they were positions")
    factor = argument(node, "downscale_factor") ** 2
    return (*axes[:-3], None if ids is None else np.repeat(ids, factor), None, None)


def channel_shuffle(spread: ChannelPropagation, node: Node) -> Axes:
    """Channels of several groups take turns; those that change places are tied over the groups."""
    axes = spread.axes[first_input(node)]
    ids = axes[1]
    if ids is None:
        return axes
    groups = argument(node, "groups")
    rows = spread.tie_rows(ids.reshape(groups, -1).T)
    return (axes[0], np.repeat(rows, groups), *axes[2:])


def flip(spread: ChannelPropagation, node: Node) -> Axes:
    """Dimensions backwards, or rolled around."""
    axes = spread.axes[first_input(node)]
    for dim in argument(node, "dims") or range(len(axes)):
        spread.freeze((axes[dim],), "reordered by number in the network's code")
    return axes


def windows(spread: ChannelPropagation, node: Node) -> Axes:
    """Sliding windows over positions, as a new last dimension."""
    axes = spread.axes[first_input(node)]
    spread.freeze((axes[argument(node, "dimension")],), "taken apart as if they were positions")
    return (*axes, None)


def patches(spread: ChannelPropagation, node: Node) -> Axes:
    """Every channel with its whole window of positions, along one dimension."""
    axes = spread.axes[first_input(node)]
    ids = axes[1]
    if ids is None:
        return fixed_axes(node)  # type: ignore[no-any-return]
    return (axes[0], np.repeat(ids, int(shape_of(node)[1]) // len(ids)), None)
