"""Which filters go: a target and scores in, a plan out.

The plan is a plain value: it can be read, saved, compared and hashed, and it changes nothing
until `surgery.apply_plan` carries it out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from secateur.config import AllocationRule, Budget, parse_budget
from secateur.errors import RunFolderError, TargetError, UsageError
from secateur.graph.dependency import RESIDUAL, DependencyGraph
from secateur.pruning.allocation import (
    SearchSpace,
    equal_shares,
    keep_fractions,
    lowest_scores,
    lowest_sensitivity,
)
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.macs_and_parameters import count_quantity, crowding_of
from secateur.pruning.ranking import Ranking, rank
from secateur.runtime.hashing import architecture_hash

Removed = dict[str, tuple[int, ...]]
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class PruningPlan:
    """The filters to remove from each group, by their number in the group's first layer."""

    removed: Removed
    budget: Budget
    criterion: str
    architecture: str | None = None
    """Hash of the network that it is for (`fingerprints.architecture_hash`): no other one is cut by
    it. None: any that has these groups."""
    weights: str | None = None
    """Hash of the weights that its scores are of (`fingerprints.weights_hash`), if known."""

    def to_json(self) -> str:
        """The plan as JSON text with its schema version and hash."""
        return json.dumps({**self._content(), "hash": self.hash}, indent=2) + "\n"

    @property
    def hash(self) -> str:
        """SHA-256 of the plan's content."""
        text = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        hashes = {"architecture": self.architecture, "weights": self.weights}
        return {
            "schema_version": SCHEMA_VERSION,
            "target": str(self.budget),
            "criterion": self.criterion,
            **{key: value for key, value in hashes.items() if value is not None},
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
                budget=parse_budget(content["target"]),
                criterion=content["criterion"],
                architecture=content.get("architecture"),
                weights=content.get("weights"),
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


@dataclass(frozen=True, eq=False)
class Allocation:
    """By which rule a plan spreads the cut over the groups, and what the rule needs.

    `uniform`: every group keeps the same share. `curves`: what is lost at the network's output is
    kept small, by the `damage` of each group (`damage.measure_damage`). `global`: the lowest scores
    go, in whatever group they are. `shares`: `{name pattern: share that stays}` as given; there the
    target is not looked at.
    """

    rule: AllocationRule = "uniform"
    sensitivity: Mapping[str, Sequence[float]] | None = None
    shares: Mapping[str, float] | None = None


def make_plan(
    scores: Mapping[str, Tensor],
    dependencies: DependencyGraph,
    target: Budget,
    criterion: str,
    *,
    allocation: Allocation | None = None,
    ties: Mapping[str, Tensor] | None = None,
    round_to: int = 1,
    min_filters: int = 1,
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """The plan that removes the lowest-scored filters until the target is met, and no more.

    How many go in each group the `allocation` says, by default equal shares; see `allocation.py`. A
    group keeps at least `min_filters`, and a multiple of `round_to` filters or all of them.
    `scores` is `{group: score [channel]}`, higher stays; for equal scores see `ranking.rank`. A
    target of latency needs the times that `timing.measure_latency` gives. Raises `TargetError`
    where even the least that may stay is too much, and `UsageError` where a score is missing or not
    finite, or what the allocation or the target needs is missing.
    """
    allocation = allocation or Allocation()
    architecture = architecture_hash(dependencies.shapes)
    ranking = rank(scores, dependencies, criterion, ties=ties)
    space = make_space(
        ranking, dependencies, target, round_to=round_to, min_filters=min_filters, latency=latency
    )
    if allocation.rule == "shares":
        if allocation.shares is None:
            raise UsageError("the allocation `shares` needs the share of each group that stays")
        counts = keep_fractions(space, allocation.shares)
        achieved = space.measure(counts) / space.measure(space.whole)
        # Rounded up: the plan keeps what it says.
        target = Budget(target.quantity, min(1.0, math.ceil(achieved * 1e4) / 1e4))
        return PruningPlan(_removed(ranking, counts), target, criterion, architecture)
    _check_reach(space, dependencies, target)
    if allocation.rule == "uniform":
        counts = equal_shares(space)
    elif allocation.rule == "global":
        ordered = {n: scores[n][ranking.order[n]].tolist() for n in dependencies.groups}
        counts = lowest_scores(space, ordered)
    else:
        if allocation.sensitivity is None:
            raise UsageError("the allocation `curves` needs the damage of each group")
        counts = lowest_sensitivity(space, allocation.sensitivity)
    return PruningPlan(_removed(ranking, counts), target, criterion, architecture)


def make_space(
    ranking: Ranking,
    dependencies: DependencyGraph,
    target: Budget,
    *,
    round_to: int = 1,
    min_filters: int = 1,
    latency: LatencyTable | None = None,
) -> SearchSpace:
    """The numbers of channels that the groups may keep, and what a target says of them."""
    measure = count_quantity(dependencies, target.quantity, latency)
    pressure = crowding_of(dependencies, target.quantity)
    order = ranking.order
    steps = {
        name: _steps(dependencies, name, channels, round_to, max(min_filters, ranking.least[name]))
        for name, channels in order.items()
    }
    return SearchSpace(
        steps,
        lambda counts: measure(_removed(ranking, counts)),
        target.fraction_left * measure({}),
        pressure and (lambda counts: pressure(_removed(ranking, counts))),
    )


def _removed(ranking: Ranking, counts: Mapping[str, int]) -> Removed:
    return {
        name: tuple(sorted(channels[counts[name] :]))
        for name, channels in ranking.order.items()
        if counts[name] < len(channels)
    }


def _check_reach(space: SearchSpace, dependencies: DependencyGraph, target: Budget) -> None:
    """Raises `TargetError` where even the least that may stay is too much."""
    if space.fits(space.least):
        return
    least = space.measure(space.least) / space.measure(space.whole)
    frozen = sum(group.size for group in dependencies.frozen)
    stream = sum(group.size for group in dependencies.frozen if group.reason == RESIDUAL)
    hint = f"; prune_residual would free {stream} of them" if stream else ""
    raise TargetError(
        f"target {target} is out of reach: {least:.3f} of the "
        f"{target.quantity} stay with the least in each of {len(space.steps)} prunable groups "
        f"({frozen} filters are frozen{hint}; `secateur inspect` lists the reasons)"
    )


def _steps(
    dependencies: DependencyGraph, name: str, order: Sequence[int], round_to: int, least: int
) -> list[int]:
    """How many channels of a group may stay, in rising order."""
    group = dependencies.groups[name]
    written = dependencies.channel_of[group.layers[0].produced]
    filters = np.bincount(written[written >= 0], minlength=len(dependencies.channel_of))[
        group.channels
    ]
    widths = itertools.accumulate(int(filters[number]) for number in order)
    allowed = [
        count
        for count, width in enumerate(widths, start=1)
        if count >= least and width % round_to == 0 and count < len(order)
    ]
    return [*allowed, len(order)]
