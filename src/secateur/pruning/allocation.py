"""How many channels each group keeps, so that a target is met.

Four rules: equal shares, least damage, the lowest scores wherever they are, and shares that are
given. The ranking of channels within a group is settled before; here only counts are.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from secateur.errors import TargetError

NOTHING = 1e-9
"""A smaller part of what there is is no gain."""
Counts = dict[str, int]
"""`{group: how many of its channels stay}`."""


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """What there is to choose from."""

    steps: Mapping[str, Sequence[int]]
    """By group: how many channels may stay, in rising order, the last of them all."""
    measure: Callable[[Counts], float]
    """What must come down to the limit."""
    limit: float
    pressure: Callable[[Counts], float] | None = None
    """What to bring down instead, where the measure is a maximum that no single group moves."""

    @property
    def whole(self) -> Counts:
        """Everything stays."""
        return {name: each[-1] for name, each in self.steps.items()}

    @property
    def least(self) -> Counts:
        """As few stay as may."""
        return {name: each[0] for name, each in self.steps.items()}

    def fits(self, counts: Counts) -> bool:
        """Whether the target is met."""
        return self.measure(counts) <= self.limit


def equal_shares(space: SearchSpace) -> Counts:
    """The largest share that fits, the same for all groups, and one step more for some of them.

    Those whose share was rounded down most come first. At least `space.least` must fit.
    """
    steps, whole = space.steps, space.whole

    def counts_at(share: float) -> Counts:
        places = {n: bisect.bisect_right(each, share * whole[n]) for n, each in steps.items()}
        return {name: steps[name][max(0, place - 1)] for name, place in places.items()}

    shares = sorted({0.0, *(n / whole[name] for name, each in steps.items() for n in each)})
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        fits = space.fits(counts_at(shares[middle] + 1e-9))
        low, high = (middle, high) if fits else (low, middle)
    counts = counts_at(shares[low] + 1e-9)
    ceiling = shares[min(high, len(shares) - 1)]
    shortfall = {name: ceiling * whole[name] - counts[name] for name in steps}
    return _filled_up(space, counts, sorted(steps, key=lambda name: -shortfall[name]))


def lowest_sensitivity(space: SearchSpace, sensitivity: Mapping[str, Sequence[float]]) -> Counts:
    """Counts that fit with little damage in all: `damage` is `{group: by channels gone}`.

    Each time the group goes down that loses least for what it brings, as far as it must to bring
    anything. It goes down along the lower convex hull of its curve: so a step that looks dear does
    not hide a cheap one behind it. At the end steps are taken back while there is room, the dearest
    first. At least `space.least` must fit.
    """
    pressure = space.pressure or space.measure
    hulls = {name: _hull(each, sensitivity[name]) for name, each in space.steps.items()}
    counts = space.whole
    now = pressure(counts)

    def gained(name: str, count: int) -> float:
        return float(now - pressure({**counts, name: count}))

    def next_step(name: str) -> tuple[float, float, str, int] | None:
        """What the group loses for what it brings, what it loses, and where it goes."""
        below = space.steps[name][: bisect.bisect_left(space.steps[name], counts[name])]
        if not below:
            return None
        # Times fall in steps of several channels: on to the first count that brings something.
        # The fewer stay the more is gained, so the counts that bring something come first.
        least = now * NOTHING
        place = bisect.bisect_left(below, True, key=lambda count: gained(name, count) <= least)
        count = below[max(0, place - 1)]
        lost = hulls[name](count) - hulls[name](counts[name])
        gain = gained(name, count)
        return (lost / gain if gain > least else math.inf, lost, name, count)

    waiting = [step for name in counts if (step := next_step(name)) is not None]
    while waiting and not space.fits(counts):
        waiting.sort()
        # What a step brings changes with every other one: the first is looked at anew.
        name = waiting.pop(0)[2]
        fresh = next_step(name)
        assert fresh is not None
        if waiting and fresh[:2] > waiting[0][:2] and fresh[0] > waiting[0][0] * (1 + 1e-9):
            waiting.append(fresh)
            continue
        counts = {**counts, name: fresh[3]}
        now = pressure(counts)
        following = next_step(name)
        if following is not None:
            waiting.append(following)
    gains = {}
    for name, count in counts.items():
        upper = min(bisect.bisect_right(space.steps[name], count), len(space.steps[name]) - 1)
        gains[name] = hulls[name](count) - hulls[name](space.steps[name][upper])
    return _filled_up(space, counts, sorted(counts, key=lambda name: -gains[name]))


def lowest_scores(space: SearchSpace, scores: Mapping[str, Sequence[float]]) -> Counts:
    """Counts for which the lowest scores go, of whatever group, until they fit.

    `scores` are those of each group's channels in the order of the ranking. Those of one group are
    measured by the mean of their sizes: most criteria have a scale of their own in each layer.
    """
    steps: list[tuple[float, str, int]] = []
    for name, each in space.steps.items():
        scale = sum(map(abs, scores[name])) / len(scores[name]) or 1.0
        for lower, upper in itertools.pairwise(each):
            worth = max(scores[name][lower:upper]) / scale
            steps.append((worth, name, lower))
    counts = space.whole
    # Ranked scores fall, but for those that must stay: a later step of a group never comes first.
    for _, name, count in sorted(steps, key=lambda step: (step[0], -step[2])):
        if space.fits(counts):
            break
        counts[name] = min(counts[name], count)
    return counts


def keep_fractions(space: SearchSpace, shares: Mapping[str, float]) -> Counts:
    """The counts nearest below the given shares; `shares` is `{name pattern: share that stays}`.

    The first pattern that fits a group's name counts; groups that none fits keep all. Raises
    `TargetError` where a pattern fits no group.
    """
    counts = space.whole
    unused = set(shares)
    for name, each in space.steps.items():
        for pattern, share in shares.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                place = bisect.bisect_right(each, share * each[-1] + 1e-9)
                counts[name] = each[max(0, place - 1)]
                break
    if unused:
        raise TargetError(
            f"no prunable group is called {sorted(unused)[0]!r}: `secateur inspect` lists them"
        )
    return counts


def _filled_up(space: SearchSpace, counts: Counts, names: Sequence[str]) -> Counts:
    """One step more for each of the groups, in turn, as far as there is room."""
    for name in names:
        place = bisect.bisect_right(space.steps[name], counts[name])
        if place == len(space.steps[name]):
            continue
        more = {**counts, name: space.steps[name][place]}
        if space.fits(more):
            counts = more
    return counts


def _hull(steps: Sequence[int], sensitivity: Sequence[float]) -> Callable[[int], float]:
    """The lower convex hull of the damage at some counts, as a function of the count."""
    whole = steps[-1]
    corners: list[tuple[int, float]] = []
    for count in steps:
        point = (count, max(0.0, sensitivity[whole - count]))
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    places = [count for count, _ in corners]

    def value(count: int) -> float:
        place = min(max(1, bisect.bisect_left(places, count)), len(corners) - 1)
        if len(corners) == 1:
            return corners[0][1]
        (one, low), (other, high) = corners[place - 1], corners[place]
        return low + (high - low) * (count - one) / (other - one)

    return value


def _is_above(one: tuple[int, float], middle: tuple[int, float], other: tuple[int, float]) -> bool:
    """Whether the middle point lies on or above the line between the two others."""
    (x0, y0), (x1, y1), (x2, y2) = one, middle, other
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
