"""The majority vote of images over filters, inside semantic regions.

Reconstructed from the abstract of Alqahtani et al. (CVIU 2021) and from the vote of their
*Neuron-based network pruning based on majority voting* (ICPR 2020, eqs. 1 to 4): a unit gets a vote
when it is among the top of its layer, and votes are summed. Here a voter is a region of an image
that shows a concept, or each cell of it. Votes are int64, in units of 1 / `VOTE`, so that shares
and weights of votes add up exactly, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.data.concept_masks import UNLABELLED
from secateur.scoring.criteria import FeatureBatch, Kernels, Need, Regions, DeferredUpdate
from secateur.scoring.iou import binarise, overlap

VOTE = 2**20
"""What one whole vote counts."""
VALUES_AT_A_TIME = 2**19
"""So many activations are squared at once: they stay in the processor's cache."""
VoteMode = Literal["share", "top", "plurality"]
VotingUnit = Literal["cells", "regions"]


@dataclass(frozen=True)
class VoteSettings:
    """How an election is held."""

    vote_mode: VoteMode
    """`share`: a vote is divided among the filters in proportion to their strength; `top`: each of
    the strongest filters gets a vote; `plurality`: the strongest one does."""
    voting_unit: VotingUnit
    """`cells`: filters compete at each cell of a region; `regions`: over the whole of it."""
    top_fraction: float
    """Share of the filters that `top` gives a vote."""
    weights: Mapping[int, float]
    """What the vote of a region counts, by the number of its concept; 1 where there is none."""

    def cast(self, strength: Float[Tensor, "*voter filter"]) -> Float[Tensor, "*voter filter"]:
        """The votes of each voter; one that sees no strength anywhere casts none."""
        if self.vote_mode == "share":
            return shares(strength)
        filters = strength.shape[-1]
        top = 1 if self.vote_mode == "plurality" else max(1, math.ceil(self.top_fraction * filters))
        return winners(strength, top)

    def weigh(self, concepts: Int[Tensor, "image region"]) -> Float[Tensor, "image region"]:
        """What the vote of each region counts; nothing where it only fills up the tensor."""
        weights = (concepts != UNLABELLED).double()
        for concept, weight in self.weights.items():
            weights[concepts == concept] = weight
        return weights


def shares(strength: Float[Tensor, "*voter filter"]) -> Float[Tensor, "*voter filter"]:
    """A vote of every voter, divided among the filters in proportion to their strength."""
    total = strength.sum(-1, keepdim=True)
    return strength / total.where(total > 0, 1.0)


def winners(strength: Float[Tensor, "*voter filter"], top: int) -> Float[Tensor, "*voter filter"]:
    """A whole vote of every voter for each of its `top` strongest filters.

    Between equal ones the filter with the smaller number wins; one without strength wins nothing.
    """
    order = strength.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    chosen = torch.zeros_like(strength).scatter(-1, order, 1.0)
    return chosen * (strength > 0)


class VoteCounts:
    """What ways to vote have in common: ballots by a rule, counted in whole units."""

    def __init__(self, rule: VoteSettings) -> None:
        self._rule = rule
        self._votes: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the votes."""
        self._votes = {
            part: torch.zeros(kernels.filters, dtype=torch.int64) for part, kernels in parts.items()
        }

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return self._votes.values()

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The number of votes."""
        return self._votes[part].double() / VOTE


class ResponseVotes(VoteCounts):
    """Votes for the filters that respond most inside the regions of concepts.

    The strength of a filter at a position is how far it moves what comes after: the square of
    |activation - mean| times the norm of the kernels that read it. Cells hold the means over the
    positions in them, so that nothing larger waits until it is known where the concepts are.

    A departure from the literal reading (`OverlapVotes`), because where a filter looks matters only
    together with how much it says there.
    """

    needs: frozenset[Need] = frozenset({"maps", "usual", "concepts"})

    def __init__(self, rule: VoteSettings) -> None:
        super().__init__(rule)
        self._norms: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the votes."""
        super().reset(parts)
        self._norms = {part: kernels.outgoing_norm.float() for part, kernels in parts.items()}

    def update(self, sight: FeatureBatch) -> DeferredUpdate:
        """Brings the responses to cells; the vote waits for the concepts."""
        assert sight.statistics is not None
        cells = responses(sight.maps, sight.statistics.mean, self._norms[sight.tap], sight.grid)
        rule, votes = self._rule, self._votes[sight.tap]

        def vote(regions: Regions) -> None:
            inside = regions.masks_at(sight.grid).flatten(2).float()  # [image, region, cell]
            weights = rule.weigh(regions.concepts)[..., None]
            if rule.voting_unit == "regions":
                cast = rule.cast(inside @ cells).double() * weights  # [image, region, filter]
            else:
                # A cell casts one ballot for each region that it lies in.
                cast = rule.cast(cells).double() * (inside.double() * weights).sum(1)[..., None]
            votes.add_((cast * VOTE).round().long().sum((0, 1)))

        return vote


class OverlapVotes(VoteCounts):
    """Votes for the filters whose binarised map overlaps a region best: the literal reading.

    The strength of a filter for a region is the intersection over union with it, each filter
    binarised at its own threshold. A filter that does not touch the region gets no vote.
    """

    needs: frozenset[Need] = frozenset({"maps", "thresholds", "concepts"})

    def update(self, sight: FeatureBatch) -> DeferredUpdate:
        """Binarises the maps; the vote waits for the concepts."""
        assert sight.statistics is not None
        active = binarise(sight.maps, sight.statistics.threshold)
        rule, votes = self._rule, self._votes[sight.tap]

        def vote(regions: Regions) -> None:
            iou = overlap(active, regions.masks_at((active.shape[2], active.shape[3]))).iou
            cast = rule.cast(iou.transpose(1, 2)) * rule.weigh(regions.concepts)[..., None]
            votes.add_((cast * VOTE).round().long().sum((0, 1)))

        return vote


def responses(
    maps: Float[Tensor, "image filter h w"],
    mean: Float[Tensor, "filter"],
    outgoing_norm: Float[Tensor, "filter"],
    grid: tuple[int, int],
) -> Float[Tensor, "image cell filter"]:
    """The mean squared response of each filter in each cell of a grid."""
    at_a_time = max(1, VALUES_AT_A_TIME // maps[:1].numel())
    cells = torch.cat([_cell_means(part, mean, grid) for part in maps.split(at_a_time)])
    return cells.flatten(2).transpose(1, 2) * outgoing_norm.square()


def _cell_means(maps: Tensor, mean: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[image, filter, *grid]`: the mean in each cell of the squared distance to `mean`."""
    squares = (maps.float() - mean[:, None, None]).square_()
    images, filters, height, width = maps.shape
    rows, columns = grid
    if height % rows or width % columns:
        return F.adaptive_avg_pool2d(squares, grid)
    # Whole rows first: the same cells, several times as fast.
    sums = squares.reshape(images, filters, rows, height // rows, width).sum(3)
    sums = sums.reshape(images, filters, rows, columns, width // columns).sum(4)
    return sums / (height // rows * (width // columns))
