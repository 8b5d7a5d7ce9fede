"""Which filters go: a target and scores in, a plan out.

The plan is a plain value: it can be read, saved, compared and hashed, and it changes nothing
until `surgery.apply_plan` carries it out.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from torch import Tensor

from secateur.errors import RunFolderError, TargetError, UsageError
from secateur.latency import LatencyTable
from secateur.quantities import Quantity, measure_of
from secateur.wiring import STREAM, Wiring

Removed = dict[str, tuple[int, ...]]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Target:
    """How much of a quantity may stay: `macs=0.7` leaves at most 70 % of the MACs."""

    quantity: Quantity
    fraction_left: float

    def __str__(self) -> str:
        return f"{self.quantity}={self.fraction_left}"


@dataclass(frozen=True)
class PruningPlan:
    """The filters to remove from each group, by their number in the group's first layer."""

    removed: Removed
    target: Target
    criterion: str

    def to_json(self) -> str:
        """The plan as JSON text with its schema version and hash."""
        return json.dumps({**self._content(), "hash": self.hash}, indent=2) + "\n"

    @property
    def hash(self) -> str:
        """SHA-256 of the plan's content."""
        text = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "target": str(self.target),
            "criterion": self.criterion,
            "removed": {name: list(filters) for name, filters in self.removed.items()},
        }

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """The plan that `to_json` wrote.

        Raises `RunFolderError` where the text is not a plan or has been changed since.
        """
        try:
            content = json.loads(text)
            plan = PruningPlan(
                removed={name: tuple(f) for name, f in content["removed"].items()},
                target=parse_target(content["target"]),
                criterion=content["criterion"],
            )
        except (
            *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
            TargetError,
        ) as error:
            raise RunFolderError(f"the plan can't be read: {error}") from error
        if content.get("schema_version") != SCHEMA_VERSION:
            found = content.get("schema_version")
            raise RunFolderError(f"the plan has schema version {found}, not {SCHEMA_VERSION}")
        if content.get("hash") != plan.hash:
            raise RunFolderError("the plan's hash does not match its content: it has been changed")
        return plan


def parse_target(text: str) -> Target:
    """The target that a text such as `macs=0.7` names; raises `TargetError`."""
    quantity, equals, number = text.partition("=")
    *names, last = (f"{name}=F" for name in get_args(Quantity))
    expected = f"give {', '.join(names)} or {last} with the fraction F that stays, 0 < F <= 1"
    if quantity not in get_args(Quantity) or not equals:
        raise TargetError(f"target {text!r} is not understood: {expected}")
    try:
        fraction = float(number)
    except ValueError:
        raise TargetError(f"target {text!r} has no number: {expected}") from None
    if not 0 < fraction <= 1:
        raise TargetError(f"target {text!r} is out of range: {expected}")
    return Target(cast(Quantity, quantity), fraction)


def make_plan(
    scores: Mapping[str, Tensor],
    wiring: Wiring,
    target: Target,
    criterion: str,
    *,
    round_to: int = 1,
    min_filters: int = 1,
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """The plan that removes the lowest-scored filters until the target is met, and no more.

    Every group keeps the same share of its filters: the largest share that meets the target, then
    one step more for as many groups as the target leaves room for, those whose share was rounded
    down most first. A group keeps at least `min_filters`, and a multiple of `round_to` filters or
    all of them. `scores` is `{group: score [channel]}`, higher stays; between equal scores the
    filter with the smaller number stays. A target of latency needs the times that
    `timing.measure_latency` gives. Raises `TargetError` where even the least that may stay is too
    much, and `UsageError` where a score is missing or not finite, or the times are missing.
    """
    for name, group in wiring.groups.items():
        if name not in scores or scores[name].shape != (len(group),):
            raise UsageError(
                f"{criterion}: {name!r} needs one score for each of {len(group)} filters"
            )
        if not scores[name].isfinite().all():
            raise UsageError(f"{criterion}: a score of {name!r} is not a finite number")
    quantity = measure_of(wiring, target.quantity, latency)
    limit = target.fraction_left * quantity({})
    order, least_counts = _orders(scores, wiring)
    steps = {
        name: _steps(wiring, name, filters, round_to, max(min_filters, least_counts[name]))
        for name, filters in order.items()
    }

    def removed_at(counts: Mapping[str, int]) -> Removed:
        return {
            name: tuple(sorted(filters[counts[name] :]))
            for name, filters in order.items()
            if counts[name] < len(filters)
        }

    def counts_at(share: float) -> dict[str, int]:
        places = {n: bisect.bisect_right(each, share * len(order[n])) for n, each in steps.items()}
        return {name: steps[name][max(0, place - 1)] for name, place in places.items()}

    least = quantity(removed_at(counts_at(0.0)))
    if least > limit:
        frozen = sum(group.size for group in wiring.frozen)
        stream = sum(group.size for group in wiring.frozen if group.reason == STREAM)
        hint = f"; cut_stream would free {stream} of them" if stream else ""
        raise TargetError(
            f"target {target} is out of reach: {least / quantity({}):.3f} of the "
            f"{target.quantity} stay with the least in each of {len(order)} prunable groups "
            f"({frozen} filters are frozen{hint}; `secateur inspect` lists the reasons)"
        )
    shares = sorted({0.0, *(n / len(order[name]) for name, each in steps.items() for n in each)})
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        fits = quantity(removed_at(counts_at(shares[middle] + 1e-9))) <= limit
        low, high = (middle, high) if fits else (low, middle)
    counts = counts_at(shares[low] + 1e-9)
    ceiling = shares[min(high, len(shares) - 1)]
    shortfall = {name: ceiling * len(order[name]) - counts[name] for name in order}
    for name in sorted(order, key=lambda name: -shortfall[name]):
        place = bisect.bisect_right(steps[name], counts[name])
        more = {**counts, name: steps[name][min(place, len(steps[name]) - 1)]}
        if quantity(removed_at(more)) <= limit:
            counts = more
    return PruningPlan(removed_at(counts), target, criterion)


def _orders(
    scores: Mapping[str, Tensor], wiring: Wiring
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """`{group: channels, the last to go first}`, and how many of them must stay.

    Of channels that make up a whole dimension of some value the best one must stay.
    """
    place = {
        channel: (name, number)
        for name, group in wiring.groups.items()
        for number, channel in enumerate(group.channels.tolist())
    }
    ranked = {
        name: scores[name].double().sort(descending=True, stable=True).indices.tolist()
        for name in wiring.groups
    }
    rank = {name: {n: r for r, n in enumerate(numbers)} for name, numbers in ranked.items()}
    needed: dict[str, set[int]] = {name: set() for name in ranked}
    for cover in wiring.covers:
        name = place[int(cover[0])][0]
        mine = [place[c][1] for c in cover.tolist() if place[c][0] == name]
        needed[name].add(min(mine, key=rank[name].__getitem__))
    order = {
        name: sorted(numbers, key=lambda n: n not in needed[name])  # a stable sort
        for name, numbers in ranked.items()
    }
    return order, {name: max(1, len(each)) for name, each in needed.items()}


def _steps(wiring: Wiring, name: str, order: Sequence[int], round_to: int, least: int) -> list[int]:
    """How many channels of a group may stay, in rising order."""
    group = wiring.groups[name]
    written = wiring.channel_of[group.layers[0].written]
    filters = np.bincount(written[written >= 0], minlength=len(wiring.channel_of))[group.channels]
    widths = itertools.accumulate(int(filters[number]) for number in order)
    allowed = [
        count
        for count, width in enumerate(widths, start=1)
        if count >= least and width % round_to == 0 and count < len(order)
    ]
    return [*allowed, len(order)]
