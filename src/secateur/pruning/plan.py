"""The pruning plan: which filters to remove, made from scores and a budget.

A plan is a plain value. It can be read, saved, compared and hashed, and it changes nothing until
`apply.apply_plan` carries it out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from secateur.config import AllocationRule, Budget, parse_budget
from secateur.graph.dependency import OUTPUT, RESIDUAL, DependencyGraph, Removed
from secateur.graph.factorisation import Ranks
from secateur.pruning.actions import BRANCH_OF, Actions, ActionSavings
from secateur.pruning.allocation import (
    Counts,
    SearchSpace,
    equal_fractions,
    keep_fractions,
    lowest_scores,
    lowest_sensitivity,
)
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.quantities import count_quantity, crowding_of
from secateur.pruning.multiples import (
    FREE,
    Multiples,
    default_multiples,
    filters_of,
    finer_multiples_note,
    groups_in_blocks,
)
from secateur.pruning.ranking import Ranking, rank
from secateur.runtime.errors import RunFolderError, TargetError, UsageError

SCHEMA_VERSION = 4
VERSION_WITHOUT_BRANCHES = 3
VERSION_WITHOUT_RANKS = 2
"""Versions that plans are written in that have no dropped branches, and no ranks either, so that
older versions can read them."""
RANK_FLOOR = 2 / 3
"""Least rank of a kernel, over the rank that the target leaves of every kernel in equal shares.
What a kernel does for the original network says little of what it can do after the cut: in the
refit it also corrects the errors of the layers before it."""
MOST_BELOW = 0.03
"""How far below the budget a plan with default multiples may end, as a fraction of it: narrow
networks would lose much more than asked for. Latency falls in steps, and is planned again."""


@dataclass(frozen=True)
class PruningPlan:
    """The filters to remove from each group, numbered as in the group's first layer."""

    removed: Removed
    budget: Budget
    criterion: str
    architecture: str | None = None
    """Hash of the network that the plan is for (`DependencyGraph.architecture`); other networks are
    refused. None: any network with these groups."""
    weights: str | None = None
    """Hash of the weights that were scored (`hashing.weights_hash`), if known."""
    ranks: Ranks = field(default_factory=dict)
    """Convolutions that become two, one after the other, with the channels in between."""
    dropped: tuple[str, ...] = ()
    """Residual branches that a constant takes the place of, in the order of execution."""
    note: str = field(default="", compare=False)
    """What to know of how the plan was made, if anything; not written with it."""

    def to_json(self) -> str:
        """Return the plan as JSON text with its schema version and hash."""
        return json.dumps({**self._content(), "hash": self.hash}, indent=2) + "\n"

    @property
    def hash(self) -> str:
        """The SHA-256 of the plan's content."""
        text = json.dumps(self._content(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        hashes = {"architecture": self.architecture, "weights": self.weights}
        version = VERSION_WITHOUT_BRANCHES if self.ranks else VERSION_WITHOUT_RANKS
        return {
            "schema_version": SCHEMA_VERSION if self.dropped else version,
            "target": str(self.budget),
            "criterion": self.criterion,
            **{key: value for key, value in hashes.items() if value is not None},
            "removed": {name: list(filters) for name, filters in self.removed.items()},
            **({"ranks": dict(self.ranks)} if self.ranks else {}),
            **({"dropped": list(self.dropped)} if self.dropped else {}),
        }

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Return the plan that `to_json` wrote.

        Raises `RunFolderError` if the text is not a plan or was changed afterwards.
        """
        try:
            content = json.loads(text)
            plan = PruningPlan(
                removed={name: tuple(f) for name, f in content["removed"].items()},
                budget=parse_budget(content["target"]),
                criterion=content["criterion"],
                architecture=content.get("architecture"),
                weights=content.get("weights"),
                ranks={name: int(rank) for name, rank in content.get("ranks", {}).items()},
                dropped=tuple(map(str, content.get("dropped", ()))),
            )
        except (
            *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
            TargetError,
        ) as error:
            raise RunFolderError(f"the plan can't be read: {error}") from error
        version = content.get("schema_version")
        if version not in range(VERSION_WITHOUT_RANKS, SCHEMA_VERSION + 1):
            raise RunFolderError(
                f"the plan has schema version {version}, and this secateur reads up to "
                f"{SCHEMA_VERSION}"
            )
        if content.get("hash") != plan.hash:
            raise RunFolderError("the plan's hash does not match its content: it has been changed")
        return plan


@dataclass(frozen=True, eq=False)
class Allocation:
    """The rule that spreads the cut over the groups, and what the rule needs.

    - `uniform`: every group keeps the same fraction.
    - `sensitivity`: keeps the change of the network's output small. Needs the `sensitivity` curve
      of each group (`sensitivity.measure_sensitivity`).
    - `global`: removes the lowest scores, whatever their group.
    - `shares`: keeps the fractions of `{name pattern: fraction that stays}` and ignores the budget.
    """

    rule: AllocationRule = "uniform"
    sensitivity: Mapping[str, Sequence[float]] | None = None
    actions: Actions = field(default_factory=Actions)
    """What may be done besides removing channels; with the rule `sensitivity` only."""
    keeps_channels: bool = False
    """Whether no group loses channels, so that only other actions save anything."""
    shares: Mapping[str, float] | None = None


def make_plan(  # public: one keyword for each thing that a user may set
    scores: Mapping[str, Tensor],
    dependencies: DependencyGraph,
    target: Budget,
    criterion: str,
    *,
    allocation: Allocation | None = None,
    ties: Mapping[str, Tensor] | None = None,
    round_to: int | None = 1,
    engine_multiple: int = 1,
    min_filters: int = 1,
    latency: LatencyTable | None = None,
) -> PruningPlan:
    """Return the plan that removes the lowest-scored filters until the budget is met, and no more.

    `scores` is `{group: score [channel]}`; higher scores stay, and `ties` decides between equal
    ones (`ranking.rank`). The `allocation` decides how many filters each group loses, by default
    the same fraction everywhere. A group keeps at least `min_filters`, and a multiple of `round_to`
    filters or all of them; None takes one of `default_multiples`,
    given the engine's. A latency budget needs the table of `latency_profiler.measure_latency`.

    Raises `TargetError` if even the smallest allowed network exceeds the budget, and `UsageError`
    if a score is missing or not finite, or if the allocation or the budget lacks its input.
    """
    allocation = allocation or Allocation()
    architecture = dependencies.architecture
    ranking = rank(scores, dependencies, criterion, ties=ties)
    ordered = {n: scores[n][ranking.order[n]].tolist() for n in dependencies.groups}
    is_free = round_to is None and allocation.rule != "shares"
    choices = (
        default_multiples(engine_multiple, has_blocks=bool(groups_in_blocks(dependencies)))
        if is_free
        else (Multiples(round_to or 1, round_to or 1),)
    )
    for multiples in choices:
        space = make_space(
            ranking,
            dependencies,
            target,
            multiples=multiples,
            min_filters=min_filters,
            latency=latency,
            allocation=allocation,
        )
        is_last = multiples == choices[-1]
        if not space.fits(space.least) and not is_last:
            continue
        counts = _counts(space, dependencies, target, allocation, ordered, multiples)
        is_close = space.measure(counts) >= (1 - MOST_BELOW) * space.limit
        if is_last or is_close or target.quantity == "latency":
            break
    if allocation.rule == "shares":
        achieved = space.measure(counts) / space.measure(space.whole)
        # Rounded up, so that the plan does not exceed its own budget.
        target = Budget(target.quantity, min(1.0, math.ceil(achieved * 1e4) / 1e4))
    removed = ranking.removed(counts)
    is_finer = multiples != choices[0]
    note = finer_multiples_note(multiples, choices[0], target) if is_finer else ""
    if allocation.rule != "sensitivity":
        return PruningPlan(removed, target, criterion, architecture, note=note)
    actions = allocation.actions
    ranks = ActionSavings(actions, dependencies, target.quantity, latency).ranks(counts, removed)
    dropped = actions.branches.dropped(counts)
    inside = actions.inside(dependencies)
    gone = {name for branch in dropped for name in inside[BRANCH_OF + branch]}
    removed = {name: filters for name, filters in removed.items() if name not in gone}
    return PruningPlan(
        removed, target, criterion, architecture, ranks=ranks, dropped=dropped, note=note
    )


def _counts(
    space: SearchSpace,
    dependencies: DependencyGraph,
    target: Budget,
    allocation: Allocation,
    ordered: Mapping[str, Sequence[float]],
    multiples: Multiples,
) -> Counts:
    """Return the channels that stay of each group, by the allocation; see `make_plan`.

    `ordered` are the scores of each group, falling.
    """
    if allocation.rule == "shares":
        if allocation.shares is None:
            raise UsageError("the allocation `shares` needs the fraction of each group that stays")
        return keep_fractions(space, allocation.shares)
    _check_reach(space, dependencies, target, allocation, multiples)
    if allocation.rule == "uniform":
        return equal_fractions(space)
    if allocation.rule == "global":
        return lowest_scores(space, ordered)
    if allocation.sensitivity is None:
        raise UsageError("the allocation `sensitivity` needs the sensitivity of each group")
    return lowest_sensitivity(space, {**allocation.sensitivity, **allocation.actions.sensitivity})


def make_space(
    ranking: Ranking,
    dependencies: DependencyGraph,
    target: Budget,
    *,
    multiples: Multiples = FREE,
    min_filters: int = 1,
    latency: LatencyTable | None = None,
    allocation: Allocation | None = None,
) -> SearchSpace:
    """Return the numbers of channels that groups may keep, with the budget as their limit.

    The ranks that convolutions may have are among them, and the residual branches that may be
    dropped, if the `allocation` holds such.
    """
    allocation = allocation or Allocation()
    measure = count_quantity(dependencies, target.quantity, latency)
    pressure = crowding_of(dependencies, target.quantity)
    in_blocks = groups_in_blocks(dependencies)

    def steps_of(name: str) -> list[int]:
        multiple = multiples.in_blocks if name in in_blocks else multiples.general
        least = max(min_filters, ranking.least[name])
        return _steps(dependencies, name, ranking.order[name], multiple, least)

    steps: dict[str, list[int]] = {name: steps_of(name) for name in ranking.order}
    if allocation.keeps_channels:
        steps = {name: allowed[-1:] for name, allowed in steps.items()}
    limit = target.fraction_left * measure({})
    actions = allocation.actions
    if not (actions.ranks.layers or actions.branches.branches):
        return SearchSpace(
            steps,
            lambda counts: measure(ranking.removed(counts)),
            limit,
            pressure and (lambda counts: pressure(ranking.removed(counts))),
        )
    savings = ActionSavings(actions, dependencies, target.quantity, latency)

    def left(counts: Counts) -> float:
        removed = ranking.removed(counts)
        return measure(removed) - savings(counts, removed)

    def with_ranks(floor: float) -> SearchSpace:
        ranks = actions.ranks.steps(multiples.general, floor)
        return SearchSpace(
            {**steps, **ranks, **actions.branches.steps},
            left,
            limit,
            jumping=frozenset(ranks),
            inside=actions.inside(dependencies),
        )

    space = with_ranks(RANK_FLOOR * target.fraction_left)
    return space if space.fits(space.least) else with_ranks(0)


def _check_reach(
    space: SearchSpace,
    dependencies: DependencyGraph,
    target: Budget,
    allocation: Allocation,
    multiples: Multiples,
) -> None:
    """Raise `TargetError` if even the smallest allowed network exceeds the budget."""
    if space.fits(space.least):
        return
    least = space.measure(space.least) / space.measure(space.whole)
    actions = allocation.actions
    smallest = []
    if not allocation.keeps_channels:
        smallest.append(f"the fewest filters in each of {len(dependencies.groups)} prunable groups")
    if actions.ranks.layers:
        smallest.append(f"the lowest rank of all convolutions ({len(actions.ranks.layers)})")
    if actions.branches.branches:
        smallest.append(f"all residual branches dropped ({len(actions.branches.branches)})")
    text = ", ".join(smallest) or "no convolution to split and no residual branch to drop"
    hint = "add channels to the actions to remove filters as well"
    if multiples.general > 1:
        text += (
            f", in multiples of {multiples.general}: a smaller round_to (--round-to) goes further"
        )
    raise TargetError(
        f"target {target} is out of reach: at least {least:.3f} of the {target.quantity} remain, "
        f"with {text} ({hint if allocation.keeps_channels else _frozen_hint(dependencies)})"
    )


def _frozen_hint(dependencies: DependencyGraph) -> str:
    """Return how many filters are frozen, and what might free them."""
    frozen = sum(group.size for group in dependencies.frozen)
    residual = sum(group.size for group in dependencies.frozen if group.reason == RESIDUAL)
    hint = f"; prune_residual (--prune-residual) would free {residual} of them" if residual else ""
    reasons: Counter[str] = Counter()
    for group in dependencies.frozen:
        if group.cause not in (OUTPUT, RESIDUAL):
            reasons[group.reason] += group.size
    if reasons:
        reason, size = reasons.most_common(1)[0]
        hint = f", {size} of them because: {reason}{hint}"
    return f"{frozen} filters are frozen{hint}; `secateur inspect` lists the reasons"


def _steps(
    dependencies: DependencyGraph, name: str, order: Sequence[int], multiple: int, least: int
) -> list[int]:
    """Return how many channels of a group may stay, in rising order."""
    filters = filters_of(dependencies, dependencies.groups[name])
    widths = itertools.accumulate(int(filters[number]) for number in order)
    allowed = [
        count
        for count, width in enumerate(widths, start=1)
        if count >= least and width % multiple == 0 and count < len(order)
    ]
    return [*allowed, len(order)]
