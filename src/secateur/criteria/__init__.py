"""Which filters matter: concept votes and the baselines, through one door.

A criterion is shown the feature maps of each group, batch by batch (`observe`), and then gives one
score a filter (`score`): the higher, the more the filter deserves to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.errors import UnknownName
from secateur.thresholds import Usual


@dataclass(frozen=True, eq=False)
class Kernels:
    """The weights around a group of filters."""

    incoming: tuple[tuple[Float[Tensor, "row ..."], Int[Tensor, "row"]], ...]
    """Of each layer that writes: its kernels, and the channel of the group that each writes."""
    channel: Int[Tensor, "filter"]
    """Channel of the group that each filter belongs to: mostly its number."""
    outgoing_norm: Float[Tensor, "filter"]
    """Euclidean norm of all that reads each filter."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What a criterion is shown of one group in one batch."""

    group: str
    """Name of the group, or of the part of it that is seen here."""
    maps: Float[Tensor, "image filter h w"]
    """Feature maps as the next layer reads them; 1×1 for hidden units of linear layers."""
    kernels: Kernels
    usual: Usual
    masks: Bool[Tensor, "image region h w"]
    """Concept masks at the maps' resolution."""
    concepts: Int[Tensor, "image region"]
    gradients: Float[Tensor, "image filter h w"] | None
    """Gradient of the images' summed loss, for criteria that need it."""


@runtime_checkable
class Observer(Protocol):
    """Whoever wants to see the feature maps."""

    @property
    def needs_images(self) -> bool:
        """Whether `observe` wants to be called at all."""

    @property
    def needs_gradients(self) -> bool:
        """Whether `Sight.gradients` must be there."""

    def observe(self, sight: Sight) -> None:
        """Takes in one group in one batch."""


@runtime_checkable
class Criterion(Observer, Protocol):
    """Evidence about a group in, one score a filter out."""

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """The scores of a group's filters, in float64; higher stays."""


def make(name: str, *, top_fraction: float, seed: int) -> Criterion:
    """The named criterion; raises `UnknownName`.

    `top_fraction` is the share of a layer's filters that get a vote at a time; `seed` is what
    `random` draws from.
    """
    table = criteria()
    if name not in table:
        raise UnknownName("criterion", name, table)
    return table[name](top_fraction, seed)


def criteria() -> Mapping[str, Callable[[float, int], Criterion]]:
    """Every criterion by name."""
    from secateur.criteria.gradients import Taylor
    from secateur.criteria.kernels import KernelNorm, Random
    from secateur.criteria.statistics import ActivationStd
    from secateur.criteria.votes import ConceptVotes, by_iou, by_response

    return {
        "vote-response": lambda top, seed: ConceptVotes(by_response, top),
        "vote-iou": lambda top, seed: ConceptVotes(by_iou, top),
        "random": lambda top, seed: Random(seed),
        "l1": lambda top, seed: KernelNorm(1),
        "l2": lambda top, seed: KernelNorm(2),
        "taylor": lambda top, seed: Taylor(),
        "activation_std": lambda top, seed: ActivationStd(),
    }
