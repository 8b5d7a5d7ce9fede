"""Saliency: where the last feature map is active at all (SCDA, Wei et al., IEEE TIP 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.concepts import Concept, ConceptMasks
from secateur.concepts.evidence import last_map
from secateur.graph import NetworkGraph, State, run


class Saliency:
    """The positions whose activation, summed over channels, is above the image's mean."""

    def __init__(self, graph: NetworkGraph, state: State, class_names: tuple[str, ...]) -> None:
        del class_names  # the salient region has no class
        self._graph = graph
        self._state = state
        self._map = last_map(graph)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """A single concept."""
        return (Concept("salient region", "saliency"),)

    def find(
        self,
        images: Float[Tensor, "image rgb height width"],
        labels: Int[Tensor, "image"] | None,
    ) -> ConceptMasks:
        """One region an image, brought to the image plane bilinearly, as SCDA does; no label."""
        del labels
        seen: list[Tensor] = []
        with torch.no_grad():
            after = {self._map: lambda value: seen.append(value.sum(1, keepdim=True))}
            run(self._graph, self._state, images, after=after)
        total = seen[0]  # [image, 1, h, w]
        fine = F.interpolate(total, images.shape[-2:], mode="bilinear", align_corners=False)
        masks = fine > total.mean(dim=(2, 3), keepdim=True)
        # A map that is flat has no position above its mean: then all of it is as salient.
        masks |= ~masks.any(dim=3, keepdim=True).any(dim=2, keepdim=True)
        return ConceptMasks(masks, torch.zeros(len(images), 1, dtype=torch.int64))
