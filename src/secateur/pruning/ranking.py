"""The order in which the channels of each group are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from secateur.graph.dependency import DependencyGraph, Removed
from secateur.runtime.errors import UsageError


@dataclass(frozen=True)
class Ranking:
    """The channels of every group, best first: the last one is removed first."""

    order: dict[str, list[int]]
    least: dict[str, int]
    """How many channels each group must keep: at least this many of the first ones."""
    _removed: dict[str, dict[int, tuple[int, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def removed(self, counts: Mapping[str, int]) -> Removed:
        """Return the channels that are removed if each group keeps `counts[group]` of them.

        A search changes one group at a time: for the two last counts of a group, it is the same
        tuple again, which `TensorSizes` need not count again.
        """
        removed = {}
        for name, channels in self.order.items():
            count = counts[name]
            if count < len(channels):
                known = self._removed.setdefault(name, {})
                if count not in known:
                    if len(known) > 1:
                        known.pop(next(iter(known)))
                    known[count] = tuple(sorted(channels[count:]))
                removed[name] = known[count]
        return removed


def rank(
    scores: Mapping[str, Tensor],
    dependencies: DependencyGraph,
    criterion: str,
    *,
    ties: Mapping[str, Tensor] | None = None,
) -> Ranking:
    """Return the channels of every group in descending order of `{group: score [channel]}`.

    Between equal scores the higher score in `ties` wins, then the smaller channel number. If
    channels make up a whole dimension of some tensor, the best of them must stay, so it comes
    first in any case. Raises `UsageError` if a score is missing or not finite; the message names
    the `criterion`.
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
        members = [place[c][1] for c in cover.tolist() if place[c][0] == name]
        needed[name].add(min(members, key=position[name].__getitem__))
    order = {
        name: sorted(numbers, key=lambda n: n not in needed[name])  # a stable sort
        for name, numbers in ranked.items()
    }
    return Ranking(order, {name: max(1, len(channels)) for name, channels in needed.items()})


def _sorted(scores: Tensor, ties: Tensor | None) -> list[int]:
    first, second = scores.double().tolist(), [0.0] * len(scores) if ties is None else ties.tolist()
    return sorted(range(len(first)), key=lambda n: (-first[n], -second[n], n))
