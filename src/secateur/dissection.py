"""What each filter sees: its best concept by dataset-wide IoU, without changing the network."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.activations import parts_of
from secateur.alignment import AlignmentTally, overlap
from secateur.criteria import Sight
from secateur.grouping import Group

DETECTOR_IOU = 0.04
"""A filter counts as a detector of a concept above this IoU (Bau et al., CVPR 2017, section 3)."""


@dataclass(frozen=True)
class FilterConcept:
    """The concept that a filter's activations overlap best."""

    concept: str
    iou: float

    @property
    def is_detector(self) -> bool:
        """Whether the overlap is large enough to call the filter a detector."""
        return self.iou > DETECTOR_IOU


class Dissection:
    """Tallies the overlap of every filter with every concept; an `Observer`."""

    needs_images = True
    needs_gradients = False

    def __init__(self, concept_names: tuple[str, ...]) -> None:
        self._names = concept_names
        self._tallies: dict[str, AlignmentTally] = {}

    def observe(self, sight: Sight) -> None:
        """Takes in one group in one batch."""
        filters = sight.maps.shape[1]
        tally = self._tallies.setdefault(sight.group, AlignmentTally(filters, len(self._names)))
        tally.add(overlap(sight.maps, sight.usual.threshold, sight.masks), sight.concepts)

    def best(self, part: str) -> list[FilterConcept]:
        """The best concept of each filter of a part of a group; between equal ones the first."""
        values, order = self._tallies[part].iou.max(dim=1)
        return [
            FilterConcept(self._names[concept], iou)
            for concept, iou in zip(order.tolist(), values.tolist(), strict=True)
        ]

    def best_by_channel(self, group: Group) -> list[FilterConcept]:
        """The best concept of each channel of a group, of all its filters."""
        found: dict[int, FilterConcept] = {}
        for part, look in parts_of(group).items():
            for channel, seen in zip(look.channel.tolist(), self.best(part), strict=True):
                if channel not in found or seen.iou > found[channel].iou:
                    found[channel] = seen
        return [found[channel] for channel in range(len(group))]
