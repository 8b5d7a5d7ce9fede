"""Filter scores: every requested criterion from one pass over the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group
from secateur.graph.taps import taps_of
from secateur.models.task import SINGLE_LABEL, Task
from secateur.runtime.errors import UsageError
from secateur.scoring.channel_means import mean_by_channel
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion, Observer
from secateur.scoring.feature_pass import run_feature_pass


@dataclass(frozen=True, eq=False)
class FilterScores:
    """One score for each channel, by group; the higher, the more the channel deserves to stay."""

    criterion: str
    scores: dict[str, Float[Tensor, "channel"]]

    @property
    def has_ties(self) -> bool:
        """Whether two channels of a group have the same score."""
        return any(len(scores.unique()) < len(scores) for scores in self.scores.values())


def score_filters(
    model: nn.Module,
    dependencies: DependencyGraph,
    batches: Callable[[], Iterable[Batch]],
    criteria: Mapping[str, Criterion],
    source: ConceptSource | None,
    settings: ScoreSection,
    *,
    observers: tuple[Observer, ...] = (),
    task: Task = SINGLE_LABEL,
) -> dict[str, FilterScores]:
    """Return the scores by each criterion; see `feature_pass.run_feature_pass` for the arguments.

    `observers` see the same pass. `source` may be None if no criterion needs concepts.
    """
    watching = [*criteria.values(), *observers]
    run_feature_pass(model, dependencies, batches, watching, source, settings, task)
    return {
        name: FilterScores(name, scores_of(criterion, dependencies))
        for name, criterion in criteria.items()
    }


def scores_of(
    criterion: Criterion, dependencies: DependencyGraph
) -> dict[str, Float[Tensor, "channel"]]:
    """Return `{group: the scores of its channels}` by a criterion that has seen all images.

    A channel of several filters gets their mean score. Raises `UsageError` if the criterion
    doesn't return one finite number for each filter.
    """
    return {group.name: _channel_scores(criterion, group) for group in dependencies.groups.values()}


def _channel_scores(criterion: Criterion, group: Group) -> Float[Tensor, "channel"]:
    rows = []
    for name, tap in taps_of(group).items():
        scores = torch.as_tensor(criterion.compute(name))
        filters = len(tap.channel)
        if scores.shape != (filters,) or not bool(scores.isfinite().all()):
            raise UsageError(
                f"the criterion must return one finite number for each of {filters} filters, but "
                f"returned a tensor of shape {list(scores.shape)}"
            )
        rows.append((torch.from_numpy(tap.channel), scores))
    return mean_by_channel(rows, len(group))[0]
