"""Criteria `vote-response` and `vote-iou`: regions of concepts vote for filters.

Reconstructed from the abstract of Alqahtani et al. (CVIU 2021) and from the vote of their
*Neuron-based network pruning based on majority voting* (ICPR 2020, eqs. 1 to 4): a neuron gets a
vote when it is among the top of its layer, and votes are summed. Here the voting unit is a region
of an image that shows a concept, or each cell of it. Votes are int64, in units of 1 / `VOTE`, so
that fractions and weights of votes add up exactly, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.config import VoteMode, VotingUnit
from secateur.data.concept_masks import UNLABELLED
from secateur.graph.taps import Kernels
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Regions
from secateur.scoring.iou import binarise, overlap

VOTE = 2**20
"""What one whole vote counts."""
VALUES_AT_A_TIME = 2**19
"""Activations that are squared at once, few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class VoteSettings:
    """How regions vote for filters."""

    vote_mode: VoteMode
    """`share`: a vote is divided among the filters in proportion to their strength; `top`: each of
    the strongest filters gets a vote; `plurality`: only the strongest one does."""
    voting_unit: VotingUnit
    """`cells`: filters compete at each cell of a region; `regions`: over the whole of it."""
    top_fraction: float
    """Fraction of the filters that `top` gives a vote."""
    weights: Mapping[int, float]
    """What the vote of a region counts, by the index of its concept; 1 for those not listed."""

    def cast(self, strength: Float[Tensor, "*unit filter"]) -> Float[Tensor, "*unit filter"]:
        """Return each voting unit's votes; a unit without any strength casts none."""
        if self.vote_mode == "share":
            return shares(strength)
        filters = strength.shape[-1]
        top = 1 if self.vote_mode == "plurality" else max(1, math.ceil(self.top_fraction * filters))
        return winners(strength, top)

    def weigh(self, concepts: Int[Tensor, "image region"]) -> Float[Tensor, "image region"]:
        """Return what the vote of each region counts: 0 if it only fills up the tensor."""
        weights = (concepts != UNLABELLED).double()
        for concept, weight in self.weights.items():
            weights[concepts == concept] = weight
        return weights


def shares(strength: Float[Tensor, "*unit filter"]) -> Float[Tensor, "*unit filter"]:
    """Return one vote for each unit, divided among the filters in proportion to their strength."""
    total = strength.sum(-1, keepdim=True)
    return strength / total.where(total > 0, 1.0)


def winners(strength: Float[Tensor, "*unit filter"], top: int) -> Float[Tensor, "*unit filter"]:
    """Return each unit's whole votes for its `top` strongest filters.

    Of equal filters the one with the smaller index wins; a filter without strength gets no vote.
    """
    order = strength.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    chosen = torch.zeros_like(strength).scatter(-1, order, 1.0)
    return chosen * (strength > 0)


class VoteCounts:
    """What the criteria here share: the settings, and the counts of votes by tap."""

    def __init__(self, settings: VoteSettings) -> None:
        self._settings = settings
        self._votes: dict[str, Tensor] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._votes = {
            tap: torch.zeros(kernels.filters, dtype=torch.int64, device=kernels.device)
            for tap, kernels in taps.items()
        }

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return self._votes.values()

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the number of votes."""
        return self._votes[tap].cpu().double() / VOTE


class ResponseVotes(VoteCounts):
    """Votes for the filters that respond most inside the regions of concepts.

    The strength of a filter at a position is how far it moves the next layer: the square of
    |activation - mean| times the norm of the kernels that consume it. Strengths are averaged over
    the positions of a cell, so that little memory is held until the concepts are known.

    This departs from the literal reading (`OverlapVotes`), because where a filter is active matters
    only together with how strong it is there.
    """

    needs: frozenset[Need] = frozenset({"maps", "statistics", "concepts"})

    def __init__(self, settings: VoteSettings) -> None:
        super().__init__(settings)
        self._norms: dict[str, Tensor] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        super().reset(taps)
        self._norms = {tap: kernels.outgoing_norm.float() for tap, kernels in taps.items()}

    def update(self, features: FeatureBatch) -> DeferredUpdate:
        """Average the responses over cells; the vote needs the concepts."""
        assert features.statistics is not None
        cells = responses(
            features.maps, features.statistics.mean, self._norms[features.tap], features.grid
        )
        settings, votes = self._settings, self._votes[features.tap]
        grid = features.grid

        def vote(regions: Regions) -> None:
            inside = regions.masks_at(grid).flatten(2).float()  # [image, region, cell]
            weights = settings.weigh(regions.concepts)[..., None]
            if settings.voting_unit == "regions":
                cast = settings.cast(inside @ cells).double() * weights  # [image, region, filter]
            else:
                # A cell votes once for each region that it lies in.
                cell_weights = (inside.double() * weights).sum(1)[..., None]
                cast = settings.cast(cells).double() * cell_weights
            votes.add_((cast * VOTE).round().long().sum((0, 1)))

        return vote


class OverlapVotes(VoteCounts):
    """Votes for the filters whose binarised map overlaps a region best: the literal reading.

    The strength of a filter for a region is the intersection over union with it, with each filter
    binarised at its own threshold. A filter that doesn't touch the region gets no vote.
    """

    needs: frozenset[Need] = frozenset({"maps", "thresholds", "concepts"})

    def update(self, features: FeatureBatch) -> DeferredUpdate:
        """Binarise the maps; the vote needs the concepts."""
        assert features.statistics is not None
        active = binarise(features.maps, features.statistics.threshold)
        settings, votes = self._settings, self._votes[features.tap]

        def vote(regions: Regions) -> None:
            iou = overlap(active, regions.masks_at((active.shape[2], active.shape[3]))).iou
            cast = settings.cast(iou.transpose(1, 2)) * settings.weigh(regions.concepts)[..., None]
            votes.add_((cast * VOTE).round().long().sum((0, 1)))

        return vote


def responses(
    maps: Float[Tensor, "image filter h w"],
    mean: Float[Tensor, "filter"],
    outgoing_norm: Float[Tensor, "filter"],
    grid: tuple[int, int],
) -> Float[Tensor, "image cell filter"]:
    """Return the mean squared response of each filter in each cell of a grid."""
    at_a_time = max(1, VALUES_AT_A_TIME // maps[:1].numel())
    cells = torch.cat([_cell_means(chunk, mean, grid) for chunk in maps.split(at_a_time)])
    return cells.flatten(2).transpose(1, 2) * outgoing_norm.square()


def _cell_means(maps: Tensor, mean: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean squared distance to `mean` in each cell, `[image, filter, *grid]`."""
    squares = (maps.float() - mean[:, None, None]).square_()
    images, filters, height, width = maps.shape
    rows, columns = grid
    if height % rows or width % columns:
        return F.adaptive_avg_pool2d(squares, grid)
    # Whole rows first: the same cells, several times as fast.
    sums = squares.reshape(images, filters, rows, height // rows, width).sum(3)
    sums = sums.reshape(images, filters, rows, columns, width // columns).sum(4)
    return sums / (height // rows * (width // columns))
