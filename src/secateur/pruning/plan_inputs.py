"""What plans follow from: filter scores, the damage of each group, times of layers.

Made once; then a plan for any target takes moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from secateur.config import Budget, PlanSection, ScoreSection, parse_budget
from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.cost.latency_model import LatencyTable
from secateur.pruning.cost.latency_profiler import measure_latency
from secateur.pruning.plan import Allocation, PruningPlan, make_plan, make_space
from secateur.pruning.ranking import rank
from secateur.pruning.sensitivity import measure_sensitivity
from secateur.runtime import distributed
from secateur.runtime.module_state import tensors_of
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion
from secateur.scoring.criteria.reconstruction import Reconstruction
from secateur.scoring.scores import FilterScores, score_filters, scores_of


@dataclass(frozen=True, eq=False)
class PlanInputs:
    """All that is known of a network before a plan is made."""

    dependencies: DependencyGraph
    scores: FilterScores
    settings: PlanSection
    allocation: Allocation
    ties: Mapping[str, Tensor] | None
    """Scores that decide between equal ones."""
    latency: LatencyTable | None

    def plan(self, budget: Budget) -> PruningPlan:
        """The plan for a target; the errors are those of `make_plan`."""
        return make_plan(
            self.scores.scores,
            self.dependencies,
            budget,
            self.scores.criterion,
            allocation=self.allocation,
            ties=self.ties,
            round_to=self.settings.round_to,
            min_filters=self.settings.min_filters,
            latency=self.latency,
        )

    def least(self, target: Budget) -> float:
        """The smallest fraction of the target's quantity that a plan can leave."""
        space = make_space(
            rank(self.scores.scores, self.dependencies, self.scores.criterion),
            self.dependencies,
            target,
            round_to=self.settings.round_to,
            min_filters=self.settings.min_filters,
            latency=self.latency,
        )
        return space.measure(space.least) / space.measure(space.whole)


def make_plan_inputs(
    model: nn.Module,
    dependencies: DependencyGraph,
    batches: Callable[[], Iterable[Batch]],
    criteria: Mapping[str, Criterion],
    source: ConceptSource,
    score: ScoreSection,
    settings: PlanSection,
    *,
    sample: Callable[[], Iterable[Batch]],
    example: Tensor,
    progress: ProgressCallback = no_progress,
) -> dict[str, PlanInputs]:
    """By the name of each criterion: the scores of the filters, and what else a plan needs.

    The error curves of `curves` come from the same pass as the scores, whatever the criterion.
    `batches` gives the calibration set, or this process's share of it; `sample` begins with the
    same of its images in every process, and `example` is a few of them.
    """
    plain: Reconstruction | None = None
    if settings.allocation == "sensitivity" and not all(
        isinstance(criterion, Reconstruction) for criterion in criteria.values()
    ):
        plain = Reconstruction()
    observers = () if plain is None else (plain,)
    scores = score_filters(
        model, dependencies, batches, criteria, source, score, observers=observers
    )
    latency = None
    if parse_budget(settings.target).quantity == "latency":
        latency = distributed.on_main_process(lambda: measure_latency(model, dependencies, example))
    surveys = {}
    for name, criterion in criteria.items():
        scored, ties = scores[name], None
        allocation = Allocation(settings.allocation, shares=settings.shares or None)
        moments = criterion if isinstance(criterion, Reconstruction) else plain
        if settings.allocation == "sensitivity" and moments is not None:
            if moments is plain and _has_ties(scored):
                ties = scores_of(moments, dependencies)
            ranking = rank(scored.scores, dependencies, name, ties=ties)
            tensors = tensors_of(model)
            damage = measure_sensitivity(
                tensors, dependencies, moments, ranking, sample(), progress=progress
            )
            allocation = replace(allocation, sensitivity=damage)
        surveys[name] = PlanInputs(dependencies, scored, settings, allocation, ties, latency)
    return surveys


def _has_ties(scored: FilterScores) -> bool:
    return any(len(each.unique()) < len(each) for each in scored.scores.values())
