"""Everything a plan needs: filter scores, the sensitivity of each group, times of layers.

They are measured once. After that, a plan for any budget takes moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.fx.node import Node

from secateur.config import Budget, PlanSection, ScoreSection
from secateur.data import Batch
from secateur.engines.multiples import EngineMultiples, measure_multiples
from secateur.engines.registry import find_engine
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import factorable_layers
from secateur.graph.module_state import tensors_of
from secateur.graph.residual_branches import residual_branches
from secateur.models.task import SINGLE_LABEL, Task
from secateur.pruning.actions import Actions, BranchChoice, RankChoice
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.latency_profiler import measure_latency
from secateur.pruning.depth_sensitivity import droppable_branches, measure_depth_sensitivity
from secateur.pruning.multiples import Multiples
from secateur.pruning.plan import Allocation, PruningPlan, make_plan, make_space
from secateur.pruning.rank_sensitivity import measure_rank_sensitivity
from secateur.pruning.ranking import rank
from secateur.pruning.sensitivity import measure_sensitivity
from secateur.runtime import distributed
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion
from secateur.scoring.criteria.reconstruction import Reconstruction
from secateur.scoring.scores import FilterScores, score_filters, scores_of


@dataclass(frozen=True, eq=False)
class PlanInputs:
    """Everything that plans for a network are made from."""

    dependencies: DependencyGraph
    scores: FilterScores
    settings: PlanSection
    allocation: Allocation
    ties: Mapping[str, Tensor] | None
    """Scores that decide between equal ones."""
    latency: LatencyTable | None
    engine_multiples: EngineMultiples | None = None
    """Measured where another engine than PyTorch is to run the network, at widths of its choice."""

    def plan(self, budget: Budget, depth_weight: float = 0.0) -> PruningPlan:
        """Return the plan for a budget; raises the errors of `make_plan`.

        The sensitivities of the last layer count `exp(depth_weight)` times as much as those of the
        first, and others in between, by their place in the order of execution.
        """
        return make_plan(
            self.scores.scores,
            self.dependencies,
            budget,
            self.scores.criterion,
            allocation=self._weighted(depth_weight),
            ties=self.ties,
            round_to=self.settings.round_to,
            engine_multiple=max(self.engine_multiples or (1,)),
            min_filters=self.settings.min_filters,
            latency=self.latency,
        )

    def _weighted(self, depth_weight: float) -> Allocation:
        """Return the allocation with sensitivities weighted by depth; see `plan`."""
        allocation = self.allocation
        if not depth_weight or allocation.sensitivity is None:
            return allocation
        layers, groups = self.dependencies.layers, self.dependencies.groups
        weight_of = {
            layer.node: math.exp(depth_weight * number / max(1, len(layers) - 1))
            for number, layer in enumerate(layers)
        }

        def weighted(curve: Sequence[float], nodes: Iterable[Node]) -> list[float]:
            weight = max((weight_of[node] for node in nodes if node in weight_of), default=1.0)
            return [weight * error for error in curve]

        ranks, branches = allocation.actions.ranks, allocation.actions.branches
        of_ranks = {
            name: weighted(curve, [ranks.layers[name].layer.node])
            for name, curve in ranks.sensitivity.items()
        }
        of_branches = {
            name: weighted([error], branches.branches[name].nodes)[0]
            for name, error in branches.sensitivity.items()
        }
        return replace(
            allocation,
            sensitivity={
                name: weighted(curve, [groups[name].layers[0].node])
                for name, curve in allocation.sensitivity.items()
            },
            actions=Actions(
                replace(ranks, sensitivity=of_ranks), replace(branches, sensitivity=of_branches)
            ),
        )

    def least(self, target: Budget) -> float:
        """Return the smallest fraction of the budget's quantity that a plan can leave."""
        space = make_space(
            rank(self.scores.scores, self.dependencies, self.scores.criterion),
            self.dependencies,
            target,
            allocation=self.allocation,
            multiples=Multiples(self.settings.round_to or 1, self.settings.round_to or 1),
            min_filters=self.settings.min_filters,
            latency=self.latency,
        )
        return space.measure(space.least) / space.measure(space.whole)


@dataclass(frozen=True, eq=False)
class CalibrationImages:
    """The calibration images in the forms that planning needs them in."""

    batches: Callable[[], Iterable[Batch]]
    """Returns this process's shard of the images."""
    sample: Callable[[], Iterable[Batch]]
    """Returns batches that begin with the same images in every process."""
    example: Tensor
    """A few of the images, `[image, channel, height, width]`."""
    task: Task = SINGLE_LABEL
    """How the network's outputs on them are read."""
    memory_bytes: float = math.inf
    """What second moments of their feature maps, and the elimination, may take."""


def make_plan_inputs(
    model: nn.Module,
    dependencies: DependencyGraph,
    images: CalibrationImages,
    criteria: Mapping[str, Criterion],
    source: ConceptSource,
    score: ScoreSection,
    settings: PlanSection,
    *,
    progress: ProgressCallback = no_progress,
) -> dict[str, PlanInputs]:
    """Return the filters' scores, and all else that a plan needs, by criterion.

    All criteria are computed in one pass over the images. With `allocation = "sensitivity"` the
    second moments for the error curves come from the same pass.
    """
    moments: Reconstruction | None = None
    if settings.allocation == "sensitivity" and not all(
        isinstance(criterion, Reconstruction) for criterion in criteria.values()
    ):
        moments = Reconstruction(memory_bytes=images.memory_bytes)
    observers = () if moments is None else (moments,)
    scores = score_filters(
        model,
        dependencies,
        images.batches,
        criteria,
        source,
        score,
        observers=observers,
        task=images.task,
    )
    ties = None
    if moments is not None and any(filter_scores.has_ties for filter_scores in scores.values()):
        ties = scores_of(moments, dependencies)
    state = tensors_of(model)
    engine, latency = find_engine(settings.engine), None
    if settings.budget.quantity == "latency":
        latency = distributed.on_main_process(
            lambda: measure_latency(model, dependencies, images.example, engine)
        )
    multiples = None
    if settings.round_to is None and settings.engine != "pytorch":
        multiples = distributed.on_main_process(lambda: measure_multiples(engine))
    actions = Actions(
        _rank_choice(model, dependencies, images, settings, progress),
        _branch_choice(model, dependencies, images, settings, progress),
    )
    inputs = {}
    for name, criterion in criteria.items():
        own_moments = criterion if isinstance(criterion, Reconstruction) else moments
        own_ties = ties if own_moments is moments and scores[name].has_ties else None
        allocation = Allocation(
            settings.allocation,
            shares=settings.shares or None,
            actions=actions,
            keeps_channels="channels" not in settings.actions,
        )
        if settings.allocation == "sensitivity" and own_moments is not None:
            ranking = rank(scores[name].scores, dependencies, name, ties=own_ties)
            sensitivity = measure_sensitivity(
                state,
                dependencies,
                own_moments,
                ranking,
                images.sample(),
                most_images=settings.sensitivity_images,
                task=images.task,
                progress=progress,
            )
            allocation = replace(allocation, sensitivity=sensitivity)
        inputs[name] = PlanInputs(
            dependencies, scores[name], settings, allocation, own_ties, latency, multiples
        )
    return inputs


def _rank_choice(
    model: nn.Module,
    dependencies: DependencyGraph,
    images: CalibrationImages,
    settings: PlanSection,
    progress: ProgressCallback,
) -> RankChoice:
    """Return the convolutions that may become two; none if `rank` is not among the actions."""
    if "rank" not in settings.actions:
        return RankChoice({}, {})
    layers = factorable_layers(model, dependencies, settings.exclude)
    sensitivity = measure_rank_sensitivity(
        tensors_of(model),
        dependencies,
        layers,
        images.sample(),
        most_images=settings.sensitivity_images,
        task=images.task,
        memory_bytes=images.memory_bytes,
        progress=progress,
    )
    return RankChoice(layers, sensitivity)


def _branch_choice(
    model: nn.Module,
    dependencies: DependencyGraph,
    images: CalibrationImages,
    settings: PlanSection,
    progress: ProgressCallback,
) -> BranchChoice:
    """Return the branches that may be dropped; none if `depth` is not among the actions."""
    if "depth" not in settings.actions:
        return BranchChoice({}, {})
    branches = residual_branches(model, dependencies, settings.exclude)
    branches = droppable_branches(model, dependencies, branches, images.example)
    sensitivity = measure_depth_sensitivity(
        model,
        dependencies,
        branches,
        images.sample(),
        most_images=settings.sensitivity_images,
        task=images.task,
        memory_bytes=images.memory_bytes,
        progress=progress,
    )
    return BranchChoice(branches, sensitivity)
