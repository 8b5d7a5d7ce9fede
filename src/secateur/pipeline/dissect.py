"""What the filters of a network respond to, from one pass over its calibration images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from secateur.config import RunConfig
from secateur.graph.groups import Group
from secateur.graph.taps import taps_of
from secateur.pipeline.scoring_context import ScoringContext
from secateur.scoring.criteria import make_criterion
from secateur.scoring.dissection import Dissection, FilterConcept, TopFeatures, TopImages
from secateur.scoring.naming import FilterName, ImageWords, Naming
from secateur.scoring.scores import FilterScores, score_filters


@dataclass(frozen=True, eq=False)
class NetworkDissection:
    """The concepts and top images of each filter, and its scores."""

    context: ScoringContext
    dissection: Dissection
    top_images: TopImages
    scores: dict[str, FilterScores]
    """By criterion."""
    names: Mapping[str, list[FilterName | None]]
    """The name of each channel, by group; empty if filters are not named."""

    def concepts(self, group: Group) -> list[FilterConcept]:
        """Return the best concept of each channel."""
        return self.dissection.best(self.dissection.iou_by_channel(group))

    def detectors(self, group: Group) -> Counter[str]:
        """Count the channels that are detectors of each concept."""
        return Counter(best.concept for best in self.concepts(group) if best.is_detector)

    def top(self, group: Group) -> TopFeatures:
        """Return the top images of each channel, as seen at the group's first tap."""
        return self.top_images.top(next(iter(taps_of(group))))


def dissect_network(
    model: nn.Module,
    context: ScoringContext,
    config: RunConfig,
    criterion_names: Sequence[str] = (),
    *,
    images: int,
    title: str = "dissecting filters",
    image_words: ImageWords | None = None,
) -> NetworkDissection:
    """Compare every filter of `model` with every concept, on the calibration images.

    `context` must have been made for `model`. `images` is how many top images are kept of each
    filter; the named criteria score the filters in the same pass. With `image_words` each filter is
    named by one of those words. Raises `SecateurError`.
    """
    dissection = Dissection(tuple(concept.name for concept in context.source.concepts))
    top_images = TopImages(images)
    naming = None if image_words is None else Naming(image_words)
    scores = score_filters(
        model,
        context.dependencies,
        partial(context.reader.read_image_shard, context.calibration, title),
        {name: make_criterion(name, context.source, config) for name in criterion_names},
        context.source,
        config.score,
        observers=(dissection, top_images, *([] if naming is None else [naming])),
        task=context.task,
    )
    top_images.merge()
    names: dict[str, list[FilterName | None]] = {}
    if naming is not None:
        naming.merge()
        names = {name: naming.names(group) for name, group in context.dependencies.groups.items()}
    return NetworkDissection(context, dissection, top_images, scores, names)
