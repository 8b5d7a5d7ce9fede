"""Where the semantic parts of an image are.

A concept source takes images and gives masks in the image plane: for each image one or more
regions, each with the number of the concept that it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.graph import NetworkGraph, State


@dataclass(frozen=True)
class Concept:
    """Something that an image can show."""

    name: str
    category: str


@dataclass(frozen=True, eq=False)
class ConceptMasks:
    """Regions of the images of a batch and what they show."""

    masks: Bool[Tensor, "image region height width"]
    concepts: Int[Tensor, "image region"]
    """Number of the concept that each region shows."""


@runtime_checkable
class ConceptSource(Protocol):
    """Images in, masks out."""

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every concept that the masks can show, in the order of their numbers."""

    def find(
        self,
        images: Float[Tensor, "image rgb height width"],
        labels: Int[Tensor, "image"] | None,
    ) -> ConceptMasks:
        """The concept masks of a batch; `labels` are the true classes where they may be used."""


def at_resolution(
    masks: Bool[Tensor, "image region height width"], size: tuple[int, int]
) -> Bool[Tensor, "image region h w"]:
    """The masks on a coarser or finer grid: a cell is inside where at least half of it is.

    Areas are averaged, so that nothing need be brought to the image's resolution. A region too
    small to fill half of any cell keeps the cells that it fills most; so no region is lost.
    """
    covered: Tensor = F.adaptive_avg_pool2d(masks.float(), size)
    most = covered.amax(dim=(2, 3), keepdim=True)
    inside: Tensor = (covered >= most.clamp(max=0.5)) & (covered > 0)
    return inside


SourceFactory = Callable[[NetworkGraph, State, tuple[str, ...]], ConceptSource]


def sources() -> dict[str, SourceFactory]:
    """Every concept source by name; each is made for a network, its weights and its classes."""
    from secateur.concepts.evidence import Evidence
    from secateur.concepts.saliency import Saliency

    return {"evidence": Evidence, "saliency": Saliency}
