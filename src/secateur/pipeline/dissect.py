"""What the filters of a network see, from one pass over its calibration set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from secateur.config import RunConfig
from secateur.graph.groups import Group
from secateur.pipeline.prune import ScoringContext, calibration_batches, make_criterion
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.dissection import Dissection, FilterConcept, TopFeatures, TopImages
from secateur.scoring.scores import FilterScores, score_filters
from secateur.scoring.taps import taps_of

VOTES = "vote-response"
"""How votes are counted where they are shown: the criterion whose scores are votes, not ranks."""


@dataclass(frozen=True, eq=False)
class NetworkDissection:
    """What each filter sees, the images that it responds to most, and how it scores."""

    context: ScoringContext
    dissection: Dissection
    top_images: TopImages
    scores: dict[str, FilterScores]
    """By criterion."""

    def concepts(self, group: Group) -> list[FilterConcept]:
        """The best concept of each channel."""
        return self.dissection.best(self.dissection.iou_by_channel(group))

    def detectors(self, group: Group) -> Counter[str]:
        """How many channels are detectors of each concept that has any."""
        return Counter(each.concept for each in self.concepts(group) if each.is_detector)

    def top(self, group: Group) -> TopFeatures:
        """The top images of a group, at the first place where it is looked at."""
        return self.top_images.top(next(iter(taps_of(group))))


def dissect_network(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    criterion_names: Sequence[str] = (),
    *,
    images: int,
    title: str = "looking at filters",
    progress: ProgressCallback = no_progress,
) -> NetworkDissection:
    """Looks at every filter of `model` on the calibration set of `context`, which was made for it.

    `images` is how many top images are kept of each filter; the criteria that are named come from
    the same pass. Raises `SecateurError`.
    """
    dissection = Dissection(tuple(concept.name for concept in context.source.concepts))
    top = TopImages(images)
    scores = score_filters(
        model,
        context.dependencies,
        lambda: calibration_batches(context, config, progress, title),
        {name: make_criterion(name, context.source, config) for name in criterion_names},
        context.source,
        config.score,
        observers=(dissection, top),
    )
    top.merge()
    return NetworkDissection(context, dissection, top, scores)
