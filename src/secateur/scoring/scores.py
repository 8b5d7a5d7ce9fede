"""Filter scores: every asked-for criterion from one pass over the calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.errors import UsageError
from secateur.graph.channel_ids import Ids
from secateur.graph.dependency import DependencyGraph
from secateur.scoring.concepts import ConceptSource
from secateur.scoring.criteria import Criterion, Observer
from secateur.scoring.feature_pass import observe, taps_of


@dataclass(frozen=True, eq=False)
class FilterScores:
    """One score a channel, by group; the higher, the more the filter deserves to stay."""

    criterion: str
    scores: dict[str, Float[Tensor, "channel"]]


def score_filters(
    model: nn.Module,
    dependencies: DependencyGraph,
    batches: Callable[[], Iterable[Batch]],
    criteria: Mapping[str, Criterion],
    source: ConceptSource | None,
    settings: ScoreSection,
    *,
    observers: tuple[Observer, ...] = (),
) -> dict[str, FilterScores]:
    """The scores by each criterion; the arguments are those of `activations.observe`.

    `observers` look on in the same pass. `source` may be None where no criterion looks at images.
    """
    watching = [*criteria.values(), *observers]
    observe(model, dependencies, batches, watching, source, settings)
    return {
        name: FilterScores(name, scores_of(each, dependencies)) for name, each in criteria.items()
    }


def scores_of(
    criterion: Criterion, dependencies: DependencyGraph
) -> dict[str, Float[Tensor, "channel"]]:
    """`{group: the scores of its channels}` by a criterion that has seen all images."""
    return {
        group.name: _by_channel(
            len(group),
            [(look.channel, criterion.compute(part)) for part, look in taps_of(group).items()],
        )
        for group in dependencies.groups.values()
    }


def _by_channel(channels: int, parts: list[tuple[Ids, Tensor]]) -> Tensor:
    """The mean score of each channel's filters."""
    total, count = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
    for channel, scores in parts:
        if scores.shape != (len(channel),) or not bool(scores.isfinite().all()):
            raise UsageError(
                f"the criterion must give one finite number a filter, {len(channel)} of them, and "
                f"gave a tensor {list(scores.shape)}"
            )
        index = torch.from_numpy(channel)
        total.index_add_(0, index, scores.double())
        count.index_add_(0, index, torch.ones(len(scores), dtype=torch.float64))
    return total / count
