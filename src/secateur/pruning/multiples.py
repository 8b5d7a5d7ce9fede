"""The multiples of channels that a cut keeps, so that engines stay fast."""

from __future__ import annotations

import math
from typing import NamedTuple

from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph
from secateur.graph.network_graph import argument


class Multiples(NamedTuple):
    """A group keeps a multiple of so many channels, or all."""

    general: int
    """Of groups in general."""
    concatenated: int
    """Of groups whose feature maps are concatenated."""

    def of(self, name: str, concatenated: frozenset[str]) -> int:
        """Return the multiple for a group, given the names of those that are concatenated."""
        return self.concatenated if name in concatenated else self.general


FREE = Multiples(1, 1)
DEFAULT_MULTIPLES = (Multiples(4, 16), Multiples(4, 4), Multiples(2, 2), FREE)
"""Of these, the first is taken that brings a plan near enough to its budget.

onnxruntime's convolutions leave their blocked layout, and take up to twice as long, or eight times
if they are depthwise, where the number of channels that they read is no multiple of 4. Feature maps
are concatenated in that layout, in blocks of 16 channels, only if each of them fills its blocks
(onnxruntime 1.32 with AVX-512, `MlasNchwc`; docs/explanation/widths.md has the times).
"""


def default_multiples(engine_multiple: int, *, has_concatenated: bool) -> tuple[Multiples, ...]:
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
            if has_concatenated or multiples.general == multiples.concatenated
        )
    )


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
