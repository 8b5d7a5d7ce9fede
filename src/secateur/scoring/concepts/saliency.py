"""Saliency: where the last feature map is most active (SCDA, Wei et al., IEEE TIP 2017)."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.graph.taps import as_maps
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext
from secateur.scoring.concepts.evidence import last_map


class Saliency(ConceptSource):
    """The cells of the last map whose activation, summed over channels, is above their mean.

    SCDA upsamples the sum to the image before it compares, and keeps only the largest connected
    part; here cells are compared as they are, and all of them stay.
    """

    def __init__(self, context: SourceContext) -> None:
        self._map = last_map(context.graph)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """A single concept."""
        return (Concept("salient region", "saliency"),)

    @property
    def node(self) -> Node:
        """The last feature map."""
        return self._map

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return one region for each image, on the last feature map's grid; labels are not used."""
        assert concept_input.value is not None
        total = (
            as_maps(concept_input.value.detach()).float().sum(1, keepdim=True)
        )  # [image, 1, h, w]
        masks = total > total.mean(dim=(2, 3), keepdim=True)
        # A flat map has no position above its mean: then all of it is the region.
        masks |= ~masks.any(dim=3, keepdim=True).any(dim=2, keepdim=True)
        return ConceptMasks(masks, masks.new_zeros(len(masks), 1, dtype=torch.int64))
