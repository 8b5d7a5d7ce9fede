"""What a plan may do besides removing channels: split convolutions in two, drop residual branches.

Each is a count among those that an allocation chooses: the rank of a kernel, and 1 or 0 of a
branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from secateur.config import Quantity
from secateur.graph.dependency import DependencyGraph, Removed
from secateur.graph.factorisation import FactorableLayer
from secateur.graph.residual_branches import ResidualBranch
from secateur.pruning.allocation import Counts
from secateur.pruning.cost.dropped import dropped_savings
from secateur.pruning.cost.factored import FactoredCost
from secateur.pruning.cost.latency_model import LatencyTable

RANK_OF = "rank of "
"""Prefix of a convolution's rank among the counts…"""
BRANCH_OF = "branch of "
"""…and of a residual branch, of which there is one or none."""


@dataclass(frozen=True, eq=False)
class RankChoice:
    """The convolutions that may become two."""

    layers: Mapping[str, FactorableLayer]
    sensitivity: Mapping[str, Sequence[float]]
    """`{name: output error when the rank is less than the whole rank by 0, 1, …}`."""

    def chosen(self, counts: Counts) -> dict[str, int]:
        """Return the ranks among an allocation's counts, of the convolutions that become two."""
        ranks = {name: counts[RANK_OF + name] for name in self.layers}
        return {name: n for name, n in ranks.items() if n < self.layers[name].whole_rank}

    def steps(self, round_to: int, floor: float) -> dict[str, Sequence[int]]:
        """Return the ranks to choose from, at least a fraction `floor` of the whole rank."""

        def allowed(whole: int) -> list[int]:
            return [*(n for n in range(round_to, whole, round_to) if n >= floor * whole), whole]

        return {RANK_OF + name: allowed(layer.whole_rank) for name, layer in self.layers.items()}


@dataclass(frozen=True, eq=False)
class BranchChoice:
    """The residual branches that may be dropped."""

    branches: Mapping[str, ResidualBranch]
    sensitivity: Mapping[str, float]
    """`{name: output error without the branch, after the kernels around it are refitted}`."""

    def dropped(self, counts: Counts) -> tuple[str, ...]:
        """Return the branches that an allocation's counts leave out."""
        return tuple(name for name in self.branches if not counts[BRANCH_OF + name])

    @property
    def steps(self) -> dict[str, Sequence[int]]:
        """The counts to choose from."""
        return {BRANCH_OF + name: (0, 1) for name in self.branches}


@dataclass(frozen=True, eq=False)
class Actions:
    """Everything that may be done besides removing channels."""

    ranks: RankChoice = field(default_factory=lambda: RankChoice({}, {}))
    branches: BranchChoice = field(default_factory=lambda: BranchChoice({}, {}))

    @property
    def sensitivity(self) -> dict[str, Sequence[float]]:
        """Curves of ranks and branches by the names of their counts."""
        ranks = {RANK_OF + name: curve for name, curve in self.ranks.sensitivity.items()}
        errors = self.branches.sensitivity.items()
        return {**ranks, **{BRANCH_OF + name: (0.0, error) for name, error in errors}}

    def inside(self, dependencies: DependencyGraph) -> dict[str, tuple[str, ...]]:
        """Return the counts that no longer matter once a branch is dropped, by its count's name."""
        result = {}
        for name, branch in self.branches.branches.items():
            groups = (
                group.name
                for group in dependencies.groups.values()
                if all(layer.node in branch.nodes for layer in group.layers)
            )
            ranks = (
                RANK_OF + layer
                for layer, factorable in self.ranks.layers.items()
                if factorable.layer.node in branch.nodes
            )
            result[BRANCH_OF + name] = (*groups, *ranks)
        return result


class ActionSavings:
    """What ranks and dropped branches save, for any channels removed."""

    def __init__(
        self,
        actions: Actions,
        dependencies: DependencyGraph,
        quantity: Quantity,
        latency: LatencyTable | None,
    ) -> None:
        """Raise `UsageError` if an action can't be planned by the quantity."""
        self._actions = actions
        self._ranks = self._branches = None
        if actions.ranks.layers:
            self._ranks = FactoredCost(dependencies, actions.ranks.layers, quantity)
        branches = actions.branches.branches
        if branches:
            self._branches = dropped_savings(dependencies, [*branches.values()], quantity, latency)
        self._branch_of = {
            layer: name
            for layer, factorable in actions.ranks.layers.items()
            for name, branch in branches.items()
            if factorable.layer.node in branch.nodes
        }

    def ranks(self, counts: Counts, removed: Removed) -> dict[str, int]:
        """Return the ranks that save anything."""
        return {name: n for name, n, saved in self._rank_savings(counts, removed) if saved}

    def __call__(self, counts: Counts, removed: Removed) -> float:
        """Return what all of them save together."""
        saved = sum(saved for *_, saved in self._rank_savings(counts, removed))
        if self._branches is not None:
            names = enumerate(self._actions.branches.branches)
            dropped = [number for number, name in names if not counts[BRANCH_OF + name]]
            saved += float(self._branches(removed)[dropped].sum()) if dropped else 0.0
        return saved

    def _rank_savings(self, counts: Counts, removed: Removed) -> list[tuple[str, int, float]]:
        if self._ranks is None:
            return []
        chosen = self._actions.ranks.chosen(counts)
        savings = self._ranks.savings(chosen, removed)
        dropped = self._actions.branches.dropped(counts)
        return [
            (name, chosen[name], float(saved))
            for name, saved in zip(self._actions.ranks.layers, savings, strict=True)
            if name in chosen and self._branch_of.get(name) not in dropped
        ]
