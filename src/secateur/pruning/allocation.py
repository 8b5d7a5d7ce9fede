"""How many channels each group keeps, so that a budget is met.

There are four rules: the same fraction everywhere, lowest sensitivity, lowest scores over all
groups, and fractions from the user. The ranking within a group is fixed before; this module only
chooses counts.
"""

from __future__ import annotations

import bisect
import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from secateur.runtime.errors import TargetError

NOTHING = 1e-9
"""A reduction by less than this fraction counts as none."""
JUMPS = 24
"""First steps that are compared for a jumping group, at most."""
Counts = dict[str, int]
"""`{group: number of its channels that stay}`."""


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The counts to choose from, and the limit to meet."""

    steps: Mapping[str, Sequence[int]]
    """By group: allowed numbers of channels, rising; the last one keeps all."""
    measure: Callable[[Counts], float]
    """The quantity that must come down to the limit."""
    limit: float
    pressure: Callable[[Counts], float] | None = None
    """A smooth proxy to reduce instead, if the measure is a maximum that no single group moves."""
    jumping: frozenset[str] = frozenset()
    """Groups whose first step may reduce little for what it costs, so that further ones count: a
    convolution that becomes two costs as much as before, at first."""
    inside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By group: others whose channels, and what their loss cost, are gone when it is at 0."""

    @property
    def whole(self) -> Counts:
        """The counts that keep everything."""
        return {name: counts[-1] for name, counts in self.steps.items()}

    @property
    def least(self) -> Counts:
        """The smallest allowed counts."""
        return {name: counts[0] for name, counts in self.steps.items()}

    def fits(self, counts: Counts) -> bool:
        """Return whether the budget is met."""
        return self.measure(counts) <= self.limit


def equal_fractions(space: SearchSpace) -> Counts:
    """Return the counts at the largest fraction that fits, the same for all groups.

    Then groups get one step more while that fits, first those that were rounded down most. At
    least `space.least` must fit.
    """
    steps, whole = space.steps, space.whole

    def counts_at(fraction: float) -> Counts:
        places = {
            n: bisect.bisect_right(counts, fraction * whole[n]) for n, counts in steps.items()
        }
        return {name: steps[name][max(0, place - 1)] for name, place in places.items()}

    fractions = sorted({0.0, *(n / whole[name] for name, counts in steps.items() for n in counts)})
    low, high = 0, len(fractions)
    while high - low > 1:
        middle = (low + high) // 2
        fits = space.fits(counts_at(fractions[middle] + 1e-9))
        low, high = (middle, high) if fits else (low, middle)
    counts = counts_at(fractions[low] + 1e-9)
    ceiling = fractions[min(high, len(fractions) - 1)]
    shortfall = {name: ceiling * whole[name] - counts[name] for name in steps}
    return _filled_up(space, counts, sorted(steps, key=lambda name: -shortfall[name]))


class _Step(NamedTuple):
    """A group's next step. Of several, the least is taken first."""

    cost: float
    """Loss per reduction."""
    loss: float
    name: str
    kept: int
    """Channels that stay."""
    left: float
    """The quantity, or its proxy, after the step."""


def lowest_sensitivity(space: SearchSpace, sensitivity: Mapping[str, Sequence[float]]) -> Counts:
    """Return counts that fit at low total sensitivity.

    `sensitivity` holds a curve by group: `sensitivity[group][n]` is the output error when `n`
    channels are removed. In each round the group with the least loss per reduction shrinks, far
    enough to reduce anything at all. Groups move along the lower convex hull of their curve, so
    that an expensive step does not hide a cheap one behind it. At the end, steps are undone while
    the result still fits, the most expensive first. At least `space.least` must fit.
    """
    pressure = space.pressure or space.measure
    hulls = {
        name: _hull(steps, sensitivity[name], is_jumping=name in space.jumping)
        for name, steps in space.steps.items()
    }
    counts = space.whole
    now = pressure(counts)

    def next_step(name: str) -> _Step | None:
        place = bisect.bisect_left(space.steps[name], counts[name])
        if not place:
            return None

        def after(count: int) -> float:
            return pressure({**counts, name: count})

        least = now * NOTHING
        if name in space.jumping and counts[name] == space.steps[name][-1]:
            return min(jumps(name), default=None)
        count = space.steps[name][place - 1]
        left = after(count)
        if now - left <= least:
            # Latency falls in steps of several channels: find the first count that reduces
            # anything. Fewer channels reduce more, so those that do come first.
            below = space.steps[name][:place]
            place = bisect.bisect_left(below, True, key=lambda count: now - after(count) <= least)
            count = below[max(0, place - 1)]
            left = after(count)
        loss = hulls[name](count) - hulls[name](counts[name])
        loss -= _lost_inside(space, hulls, counts, name)
        gain = now - left
        return _Step(loss / gain if gain > least else math.inf, loss, name, count, left)

    def jumps(name: str) -> Iterator[_Step]:
        """Yield steps of several sizes from the whole group, which cost nothing where it is."""
        below = space.steps[name][:-1]
        for count in below[:: -(-len(below) // JUMPS)]:
            left = pressure({**counts, name: count})
            loss, gain = hulls[name](count), now - left
            cost = loss / gain if gain > now * NOTHING else math.inf
            yield _Step(cost, loss, name, count, left)

    queue = sorted(step for name in counts if (step := next_step(name)) is not None)
    while queue and not (now <= space.limit if space.pressure is None else space.fits(counts)):
        # Every step taken changes what the others reduce: recompute the first one.
        name = queue.pop(0).name
        fresh = next_step(name)
        assert fresh is not None
        if queue and fresh[:2] > queue[0][:2] and fresh[0] > queue[0][0] * (1 + 1e-9):
            bisect.insort(queue, fresh)
            continue
        counts = {**counts, name: fresh.kept}
        now = fresh.left
        following = next_step(name)
        if following is not None:
            bisect.insort(queue, following)
    gains = {}
    for name, count in counts.items():
        upper = min(bisect.bisect_right(space.steps[name], count), len(space.steps[name]) - 1)
        gains[name] = hulls[name](count) - hulls[name](space.steps[name][upper])
        gains[name] -= _lost_inside(space, hulls, counts, name)
    names = sorted(counts, key=lambda name: -gains[name])
    filled = _filled_up(space, counts, names)
    while space.inside and filled != counts:  # the last step may have been a large one
        counts, filled = filled, _filled_up(space, filled, names)
    return filled


def _lost_inside(
    space: SearchSpace, hulls: Mapping[str, Callable[[int], float]], counts: Counts, name: str
) -> float:
    """Return what the groups inside of a group have lost."""
    return math.fsum(hulls[inner](counts[inner]) for inner in space.inside.get(name, ()))


def lowest_scores(space: SearchSpace, scores: Mapping[str, Sequence[float]]) -> Counts:
    """Return counts that fit when the lowest scores of all groups are removed first.

    `scores` are those of each group's channels, in the order of the ranking. They are divided by
    the group's mean absolute score, since most criteria have a scale of their own in each layer.
    """
    steps: list[tuple[float, str, int]] = []
    for name, allowed in space.steps.items():
        scale = sum(map(abs, scores[name])) / len(scores[name]) or 1.0
        for lower, upper in itertools.pairwise(allowed):
            highest = max(scores[name][lower:upper]) / scale
            steps.append((highest, name, lower))
    counts = space.whole
    # Ranked scores fall, except those that must stay: a later step of a group never comes first.
    for _, name, count in sorted(steps, key=lambda step: (step[0], -step[2])):
        if space.fits(counts):
            break
        counts[name] = min(counts[name], count)
    return counts


def keep_fractions(space: SearchSpace, fractions: Mapping[str, float]) -> Counts:
    """Return the counts nearest below `{name pattern: fraction that stays}`.

    The first pattern that matches a group's name counts; groups that match none keep all channels.
    Raises `TargetError` if a pattern matches no group.
    """
    kept = space.whole
    unused = set(fractions)
    for name, counts in space.steps.items():
        for pattern, fraction in fractions.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                place = bisect.bisect_right(counts, fraction * counts[-1] + 1e-9)
                kept[name] = counts[max(0, place - 1)]
                break
    if unused:
        raise TargetError(
            f"no prunable group is called {sorted(unused)[0]!r}: `secateur inspect` lists them"
        )
    return kept


def _filled_up(space: SearchSpace, counts: Counts, names: Sequence[str]) -> Counts:
    """Give each group one step more, in the order of `names`, if it fits."""
    for name in names:
        place = bisect.bisect_right(space.steps[name], counts[name])
        if place == len(space.steps[name]):
            continue
        more = {**counts, name: space.steps[name][place]}
        if space.fits(more):
            counts = more
    return counts


def _hull(
    steps: Sequence[int], sensitivity: Sequence[float], *, is_jumping: bool
) -> Callable[[int], float]:
    """Return the lower convex hull of the sensitivity at some counts: a function of the count.

    That of a jumping group is the hull without its last count.
    """
    whole = steps[-1]
    corners: list[tuple[int, float]] = []
    for count in steps[:-1] if is_jumping and len(steps) > 1 else steps:
        point = (count, max(0.0, sensitivity[whole - count]))
        while len(corners) > 1 and _is_above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    places = [count for count, _ in corners]

    def value(count: int) -> float:
        if count == whole:
            return sensitivity[0]
        place = min(max(1, bisect.bisect_left(places, count)), len(corners) - 1)
        if len(corners) == 1:
            return corners[0][1]
        (left, low), (right, high) = corners[place - 1], corners[place]
        return low + (high - low) * (count - left) / (right - left)

    return value


def _is_above(left: tuple[int, float], middle: tuple[int, float], right: tuple[int, float]) -> bool:
    """Return whether the middle point lies on or above the line between the two others."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
