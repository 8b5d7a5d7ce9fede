"""In which order the channels of each group go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from secateur.errors import UsageError
from secateur.graph.dependency import DependencyGraph


@dataclass(frozen=True)
class Ranking:
    """The channels of every group, from the one that goes last to the one that goes first."""

    order: dict[str, list[int]]
    least: dict[str, int]
    """How many of each group must stay: at least so many of the first."""


def rank(
    scores: Mapping[str, Tensor],
    dependencies: DependencyGraph,
    criterion: str,
    *,
    ties: Mapping[str, Tensor] | None = None,
) -> Ranking:
    """The channels by score, `{group: score [channel]}`, the highest first.

    Between equal scores the one with the higher score in `ties` stays, then the one with the
    smaller number. Of channels that make up a whole dimension of some value the best one must stay:
    those come first in any case. Raises `UsageError` where a score is missing or not finite.
    """
    for name, group in dependencies.groups.items():
        if name not in scores or scores[name].shape != (len(group),):
            raise UsageError(
                f"{criterion}: {name!r} needs one score for each of {len(group)} filters"
            )
        if not scores[name].isfinite().all():
            raise UsageError(f"{criterion}: a score of {name!r} is not a finite number")
    place = {
        channel: (name, number)
        for name, group in dependencies.groups.items()
        for number, channel in enumerate(group.channels.tolist())
    }
    ranked = {
        name: _sorted(scores[name], None if ties is None else ties.get(name))
        for name in dependencies.groups
    }
    position = {name: {n: r for r, n in enumerate(numbers)} for name, numbers in ranked.items()}
    needed: dict[str, set[int]] = {name: set() for name in ranked}
    for cover in dependencies.covers:
        name = place[int(cover[0])][0]
        mine = [place[c][1] for c in cover.tolist() if place[c][0] == name]
        needed[name].add(min(mine, key=position[name].__getitem__))
    order = {
        name: sorted(numbers, key=lambda n: n not in needed[name])  # a stable sort
        for name, numbers in ranked.items()
    }
    return Ranking(order, {name: max(1, len(each)) for name, each in needed.items()})


def _sorted(scores: Tensor, ties: Tensor | None) -> list[int]:
    best, other = scores.double().tolist(), [0.0] * len(scores) if ties is None else ties.tolist()
    return sorted(range(len(best)), key=lambda n: (-best[n], -other[n], n))
