"""Which filters go: a target and scores in, a plan out.

The plan is a plain value: it can be read, saved, compared and hashed, and it changes nothing
until `surgery.apply_plan` carries it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor

from secateur.errors import RunFolderError, TargetError, UsageError
from secateur.wiring import Wiring

Quantity = Literal["macs", "params", "filters"]
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
    expected = "give macs=F, params=F or filters=F with the fraction F that stays, 0 < F <= 1"
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
    scores: Mapping[str, Tensor], wiring: Wiring, target: Target, criterion: str
) -> PruningPlan:
    """The plan that removes the lowest-scored filters until the target is met, and no more.

    Every group keeps the same share of its filters (at least one): the largest share that meets
    the target, then one filter more for as many groups as the target leaves room for, those whose
    share was rounded down most first. `scores` is `{group: score [channel]}`, higher stays; between
    equal scores the filter with the smaller number stays. Raises `TargetError` where even one
    filter a group is too much, and `UsageError` where a score is missing or not finite.
    """
    for name, group in wiring.groups.items():
        if name not in scores or scores[name].shape != (len(group),):
            raise UsageError(
                f"{criterion}: {name!r} needs one score for each of {len(group)} filters"
            )
        if not scores[name].isfinite().all():
            raise UsageError(f"{criterion}: a score of {name!r} is not a finite number")
    quantity = _quantity(wiring, target.quantity)
    limit = target.fraction_left * quantity({})
    order = {
        name: scores[name].double().sort(descending=True, stable=True).indices.tolist()
        for name in wiring.groups
    }

    def removed_at(counts: Mapping[str, int]) -> Removed:
        return {
            name: tuple(sorted(filters[counts[name] :]))
            for name, filters in order.items()
            if counts[name] < len(filters)
        }

    def counts_at(share: float) -> dict[str, int]:
        return {name: max(1, int(share * len(filters))) for name, filters in order.items()}

    least = quantity(removed_at(counts_at(0.0)))
    if least > limit:
        frozen = sum(group.size for group in wiring.frozen)
        raise TargetError(
            f"target {target} is out of reach: {least / quantity({}):.3f} of the "
            f"{target.quantity} stay with one filter left in each of {len(order)} prunable groups "
            f"({frozen} filters are frozen; `secateur inspect` lists the reasons)"
        )
    shares = sorted({0.0, *(n / len(f) for f in order.values() for n in range(len(f) + 1))})
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        fits = quantity(removed_at(counts_at(shares[middle] + 1e-9))) <= limit
        low, high = (middle, high) if fits else (low, middle)
    counts = counts_at(shares[low] + 1e-9)
    ceiling = shares[min(high, len(shares) - 1)]
    shortfall = {name: ceiling * len(order[name]) - counts[name] for name in order}
    for name in sorted(order, key=lambda name: -shortfall[name]):
        more = {**counts, name: min(counts[name] + 1, len(order[name]))}
        if quantity(removed_at(more)) <= limit:
            counts = more
    return PruningPlan(removed_at(counts), target, criterion)


def _quantity(wiring: Wiring, name: Quantity) -> Callable[[Removed], float]:
    if name == "macs":
        return wiring.macs
    if name == "params":
        return wiring.params
    prunable = sum(len(group) for group in wiring.groups.values())
    return lambda removed: prunable - sum(len(filters) for filters in removed.values())
