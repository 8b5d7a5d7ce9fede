"""The multiples of channels that a cut keeps, so that engines stay fast."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from secateur.config import Budget
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.network_graph import argument


class Multiples(NamedTuple):
    """A group keeps a multiple of so many channels, or all."""

    general: int
    """Of groups in general."""
    in_blocks: int
    """Of groups that are cut by whole blocks (`groups_in_blocks`)."""

    def __str__(self) -> str:
        """Return the multiples in words."""
        if self.in_blocks == self.general:
            return f"multiples of {self.general}"
        return (
            f"multiples of {self.general} ({self.in_blocks} in wide layers and where feature maps "
            "are concatenated)"
        )


FREE = Multiples(1, 1)
WIDE = 128
"""Channels of a group from which on whole blocks are fine enough: an eighth of it at most."""
DEFAULT_MULTIPLES = (Multiples(4, 16), Multiples(4, 4), Multiples(2, 2), FREE)
"""Of these, the first is taken that brings a plan near enough to its budget.

onnxruntime's convolutions leave their blocked layout, and take up to twice as long, or eight times
if they are depthwise, where the number of channels that they read is no multiple of 4. Feature maps
are concatenated in that layout, in blocks of 16 channels, only if each of them fills its blocks.
Part of a block takes as long as a whole one (onnxruntime 1.32 with AVX-512, `MlasNchwc`;
docs/explanation/widths.md has the times).
"""


def default_multiples(engine_multiple: int, *, has_blocks: bool) -> tuple[Multiples, ...]:
    """Return the multiples to try, the coarsest first.

    Convolutions of the engine that will run the network need to read a multiple of
    `engine_multiple` channels.
    """
    needed = [
        Multiples(*(math.lcm(multiple, engine_multiple) for multiple in multiples))
        for multiples in DEFAULT_MULTIPLES
    ]
    return tuple(
        dict.fromkeys(
            multiples
            for multiples in (*needed, *DEFAULT_MULTIPLES)
            if has_blocks or multiples.general == multiples.in_blocks
        )
    )


def finer_multiples_note(multiples: Multiples, refused: Multiples, budget: Budget) -> str:
    """Return that a plan keeps finer multiples than the default ones, and why."""
    kept = "any number of filters" if multiples == FREE else f"filters in {multiples}"
    return (
        f"Layers keep {kept}: in {refused}, no plan ends near {budget}. An engine may take longer "
        f"for such numbers. With --round-to {refused.general} they keep multiples of "
        f"{refused.general}, and the target may be missed."
    )


def filters_of(dependencies: DependencyGraph, group: Group) -> npt.NDArray[np.int64]:
    """Return `[channel]`: how many filters of the group's first layer each channel is."""
    produced = dependencies.channel_of[group.layers[0].produced]
    counts = np.bincount(produced[produced >= 0], minlength=len(dependencies.channel_of))
    return counts[group.channels]


def groups_in_blocks(dependencies: DependencyGraph) -> frozenset[str]:
    """Return the groups that are wide, or whose feature maps are concatenated."""
    wide = {
        name
        for name, group in dependencies.groups.items()
        if filters_of(dependencies, group).sum() >= WIDE
    }
    return concatenated_groups(dependencies) | wide


def concatenated_groups(dependencies: DependencyGraph) -> frozenset[str]:
    """Return the groups some of whose channels are concatenated with other channels."""
    group_of = {
        int(channel): name
        for name, group in dependencies.groups.items()
        for channel in group.channels
    }
    names: set[str] = set()
    for node, axes in dependencies.axes.items():
        if not str(node.target).startswith("aten.cat."):
            continue
        dim = argument(node, "dim", 0) % len(axes)
        parts = [dependencies.axes[part] for part in node.all_input_nodes]
        joined = [part[dim] for part in parts if len(part) == len(axes)]
        if len(joined) == 1:
            continue
        for ids in joined:
            if ids is not None:
                channels = dependencies.channel_of[ids]
                names |= {group_of[int(number)] for number in channels if number != NOT_PRUNABLE}
    return frozenset(names)
