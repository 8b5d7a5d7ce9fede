"""Which filters matter: concept votes and the baselines, through one door.

A criterion is shown the feature maps of each group, batch by batch (`observe`), and then gives one
score a filter (`score`): the higher, the more the filter deserves to stay. It keeps sums over
images only, never a feature map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from secateur.config import CRITERIA, ScoreSection
from secateur.data.concept_masks import ConceptMasks, at_resolution, coverage_at
from secateur.errors import UnknownName, UsageError
from secateur.graph.patches import Window
from secateur.models import user_code
from secateur.scoring.thresholds import ActivationStatistics

Need = Literal["maps", "usual", "thresholds", "concepts", "gradients"]
"""What an observer wants to be shown: feature maps at all; each filter's usual activation, which
takes a sampled pass of its own, and with it its threshold; concept masks; gradients of the loss."""


@dataclass(frozen=True, eq=False)
class ConsumerKernel:
    """A layer that reads the filters of a group."""

    window: Window
    """How its kernel moves; of one tap where it is no plain convolution."""
    weights: Float[Tensor, "output tap filter"]
    """Zero for filters that it does not read."""


@dataclass(frozen=True, eq=False)
class Kernels:
    """The weights around a group of filters."""

    incoming: tuple[tuple[Float[Tensor, "row ..."], Int[Tensor, "row"]], ...]
    """Of each layer that writes: its kernels, and the channel of the group that each writes."""
    channel: Int[Tensor, "filter"]
    """Channel of the group that each filter belongs to: mostly its number."""
    consumers: tuple[ConsumerKernel, ...]
    """The layers that read the filters."""
    norm_scales: tuple[tuple[Float[Tensor, "row"], Int[Tensor, "row"]], ...]
    """Of each batch norm on the way: its scales, and the channel of the group that each belongs
    to."""

    @property
    def filters(self) -> int:
        """How many filters there are."""
        return len(self.channel)

    @property
    def outgoing_norm(self) -> Float[Tensor, "filter"]:
        """Euclidean norm of all that reads each filter, in float64."""
        squares = torch.zeros(self.filters, dtype=torch.float64)
        for reader in self.consumers:
            norm = torch.linalg.vector_norm(reader.weights, dim=(0, 1), dtype=torch.float64)
            squares += norm.square().cpu()
        return squares.sqrt()


Size = tuple[int, int]


class Regions:
    """Where the concepts are in the images of a batch, at any resolution."""

    def __init__(self, found: ConceptMasks) -> None:
        masks = found.masks
        self.concepts: Int[Tensor, "image region"] = found.concepts
        """Number of the concept that each region shows, or `regions.ABSENT`."""
        self.size: Size = (masks.shape[2], masks.shape[3])
        """Resolution of the masks as their source gives them: a finer one tells nothing more."""
        self.at: Callable[[Size], Bool[Tensor, "image region h w"]] = functools.cache(
            lambda size: at_resolution(masks, size)
        )
        """The masks at a resolution, see `regions.at_resolution`."""
        self.shares_at: Callable[[Size], UInt8[Tensor, "image region h w"]] = functools.cache(
            lambda size: coverage_at(masks, size)
        )
        """How much of each cell is inside, see `regions.shares_at`."""


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """What an observer is shown of one part of a group in one batch."""

    tap: str
    maps: Float[Tensor, "image filter h w"]
    """Feature maps as the next layer reads them; 1×1 for hidden units of linear layers. Not to be
    changed, nor kept: what is needed later is reduced at once."""
    indices: Int[Tensor, "image"]
    """Number of each image in the calibration set; a sample of images is chosen by it."""
    kernels: Kernels
    statistics: ActivationStatistics | None
    """There for observers that need it."""
    grid: tuple[int, int]
    """Cells that responses are brought to: at most the size of the maps."""
    gradients: Float[Tensor, "image filter h w"] | None
    """Gradient of the images' summed loss, for observers that need it."""


Vote = Callable[[Regions], None]
"""The rest of an observation, once it is known where the concepts are."""


@runtime_checkable
class Observer(Protocol):
    """Whoever wants to see the feature maps."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it wants to be shown; with nothing it is never called."""

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Called once before the first image: the parts there are, with the weights around them."""

    def update(self, sight: FeatureBatch) -> Vote | None:
        """Takes in one part in one batch; what must wait for the concepts is given back."""

    def state(self) -> Iterable[Tensor]:
        """The sums over images, always in the same order: added up in place over processes."""


@runtime_checkable
class Criterion(Observer, Protocol):
    """Evidence about a part of a group in, one score a filter out."""

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The scores of a part's filters, in float64; higher stays."""


def check_name(name: str) -> None:
    """Raises `UnknownName` or `UsageError` where there is no such criterion."""
    if user_code.is_user_code(name):
        user_code.check_file(name, "criterion")
    elif name not in CRITERIA:
        raise UnknownName("criterion", name, CRITERIA)


def make(name: str, settings: ScoreSection, seed: int, weights: Mapping[int, float]) -> Criterion:
    """The named criterion, or `path/to/file.py:factory`, where `factory()` returns one.

    Raises `UnknownName` or `UsageError`.

    `settings` say how elections are held and `weights` what the vote for a concept counts, by its
    number; `seed` is what `random` draws from.
    """
    from secateur.scoring.criteria import kernels
    from secateur.scoring.criteria.dependence import ChannelIndependence
    from secateur.scoring.criteria.gradients import Taylor
    from secateur.scoring.criteria.reconstruction import Reconstruction
    from secateur.scoring.criteria.statistics import (
        ActivationEntropy,
        ActivationMean,
        ActivationStd,
        Apoz,
        MapRank,
    )
    from secateur.scoring.criteria.votes import OverlapVotes, ResponseVotes, VoteSettings

    rule = VoteSettings(settings.vote_mode, settings.voting_unit, settings.top_fraction, weights)
    table: dict[str, Callable[[], Criterion]] = {
        "vote": lambda: Reconstruction(rule),
        "vote-response": lambda: ResponseVotes(rule),
        "vote-iou": lambda: OverlapVotes(replace(rule, vote_mode="top", voting_unit="regions")),
        "random": lambda: kernels.Random(seed),
        "l1": lambda: kernels.OfKernels(kernels.l1),
        "l2": lambda: kernels.OfKernels(kernels.l2),
        "fpgm": lambda: kernels.OfKernels(kernels.distance_to_others),
        "bn_scale": kernels.NormScale,
        "apoz": Apoz,
        "activation_mean": ActivationMean,
        "activation_std": ActivationStd,
        "activation_entropy": ActivationEntropy,
        "hrank": MapRank,
        "chip": ChannelIndependence,
        "reconstruction": Reconstruction,
        "taylor": Taylor,
    }
    assert tuple(table) == CRITERIA
    check_name(name)
    if name in table:
        return table[name]()
    own = user_code.call(name, user_code.find(name, "criterion"))
    if not isinstance(own, Criterion):
        wanted = "needs, begin, observe, tallies and score"
        raise UsageError(f"{name} returned {type(own).__name__}, no criterion: it lacks {wanted}")
    return own
