"""Saliency: where the last feature map is active at all (SCDA, Wei et al., IEEE TIP 2017)."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext
from secateur.scoring.concepts.evidence import last_map


class Saliency(ConceptSource):
    """The cells of the last map whose activation, summed over channels, is above their mean.

    SCDA brings the sum to the image plane before it compares, and keeps the largest connected part
    alone; here cells are compared as they are, and all of them stay.
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

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """One region an image, on the grid of the last feature map; no label is looked at."""
        assert scene.value is not None
        total = scene.value.detach().float().sum(1, keepdim=True)  # [image, 1, h, w]
        masks = total > total.mean(dim=(2, 3), keepdim=True)
        # A map that is flat has no position above its mean: then all of it is as salient.
        masks |= ~masks.any(dim=3, keepdim=True).any(dim=2, keepdim=True)
        return ConceptMasks(masks, torch.zeros(len(masks), 1, dtype=torch.int64))
