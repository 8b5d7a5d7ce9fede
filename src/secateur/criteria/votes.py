"""The majority vote of images over filters, restricted to semantic regions.

Reconstructed from the abstract of Alqahtani et al. (CVIU 2021) and from the vote of their
*Neuron-based network pruning based on majority voting* (ICPR 2020, eqs. 1 to 4): a unit gets a vote
when it is among the top of its layer, and votes are summed. Here the top is taken inside the
region of a concept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.alignment import overlap, response_winners
from secateur.criteria import Kernels, Sight

Election = Callable[[Sight, int], Tensor]
"""What is seen of a batch and how many filters win at a time, in; the winners' numbers out."""


class ConceptVotes:
    """Counts, filter by filter, the elections that it wins."""

    needs_images = True
    needs_gradients = False

    def __init__(self, election: Election, top_fraction: float) -> None:
        self._election = election
        self._top_fraction = top_fraction
        self._votes: dict[str, Tensor] = {}

    def observe(self, sight: Sight) -> None:
        """Counts the votes of a batch."""
        filters = sight.maps.shape[1]
        votes = self._votes.setdefault(sight.group, torch.zeros(filters, dtype=torch.int64))
        top = max(1, math.ceil(self._top_fraction * filters))
        votes += self._election(sight, top).bincount(minlength=filters).cpu()

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """The number of votes."""
        return self._votes[group].double()


def by_response(sight: Sight, top: int) -> Int[Tensor, "vote"]:
    """A vote at every position of every region for the filters that respond most there.

    A departure from the literal reading (`by_iou`), because where a filter looks matters only
    together with how much it says there. Equal responses are told apart by `torch.topk`; a filter
    without response gets no vote.
    """
    mean, outgoing = sight.usual.mean, sight.kernels.outgoing_norm
    winners = torch.cat(
        [
            response_winners(sight.maps, mean, outgoing, sight.masks[:, region], top).flatten()
            for region in range(sight.masks.shape[1])
        ]
    )
    return winners[winners < sight.maps.shape[1]]


def by_iou(sight: Sight, top: int) -> Int[Tensor, "vote"]:
    """A vote of every region for the filters whose binarised map overlaps it best.

    The literal reading: intersection over union with the region, each filter binarised at its own
    threshold. A filter that does not touch the region gets no vote; between equal overlaps the
    filter with the smaller number gets it.
    """
    iou = overlap(sight.maps, sight.usual.threshold, sight.masks).iou
    values, order = iou.sort(dim=1, descending=True, stable=True)
    return order[:, :top][values[:, :top] > 0]
