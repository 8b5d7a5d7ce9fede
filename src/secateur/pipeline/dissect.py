"""What the filters of a network see, from one pass over its probe set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from secateur.config import RunConfig
from secateur.graph.groups import Group
from secateur.pipeline.prune import Ground, make_criterion, probe_stream
from secateur.runtime.progress import Track, silent
from secateur.scoring.dissection import Dissection, FilterConcept, TopImages, TopSights
from secateur.scoring.feature_pass import parts_of
from secateur.scoring.scores import FilterScores, score_filters

VOTES = "vote-response"
"""How votes are counted where they are shown: the criterion whose scores are votes, not ranks."""


@dataclass(frozen=True, eq=False)
class Sights:
    """What each filter sees, the images that it responds to most, and how it scores."""

    ground: Ground
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

    def top(self, group: Group) -> TopSights:
        """The top images of a group, at the first place where it is looked at."""
        return self.top_images.sights(next(iter(parts_of(group))))


def see(
    model: nn.Module,
    ground: Ground,
    config: RunConfig,
    criterion_names: Sequence[str] = (),
    *,
    images: int,
    title: str = "looking at filters",
    track: Track = silent,
) -> Sights:
    """Looks at every filter of `model` on the probe set of `ground`, which was made for it.

    `images` is how many top images are kept of each filter; the criteria that are named come from
    the same pass. Raises `SecateurError`.
    """
    dissection = Dissection(tuple(concept.name for concept in ground.source.concepts))
    top = TopImages(images)
    scores = score_filters(
        model,
        ground.wiring,
        lambda: probe_stream(ground, config, track, title),
        {name: make_criterion(name, ground.source, config) for name in criterion_names},
        ground.source,
        config.score,
        observers=(dissection, top),
    )
    top.merge()
    return Sights(ground, dissection, top, scores)
