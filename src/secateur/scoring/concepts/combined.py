"""Several concept sources as one."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, at_resolution
from secateur.scoring.concepts import ConceptInput, ConceptSource


class Combined:
    """The regions of several sources side by side; their concepts follow one another.

    All that look at a value of the network must look at the same one.
    """

    def __init__(self, sources: tuple[ConceptSource, ...]) -> None:
        self._sources = sources
        nodes = {source.node for source in sources if source.node is not None}
        assert len(nodes) <= 1, f"sources that look at different values: {nodes}"
        self._node = next(iter(nodes), None)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Those of every source."""
        return tuple(concept for source in self._sources for concept in source.concepts)

    @property
    def node(self) -> Node | None:
        """The one that some source needs."""
        return self._node

    @property
    def needs_gradient(self) -> bool:
        """Whether some source does."""
        return any(source.needs_gradient for source in self._sources)

    @property
    def needs_learning(self) -> bool:
        """Whether some source does."""
        return any(source.needs_learning for source in self._sources)

    def learn(self, scene: ConceptInput) -> None:
        """Shows the scene to those who learn."""
        for source in self._sources:
            if source.needs_learning:
                source.learn(scene)

    def finish_learning(self) -> None:
        """Passed on to those who learn."""
        for source in self._sources:
            if source.needs_learning:
                source.finish_learning()

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """Every source's regions, all at the resolution of the finest, at most the images'."""
        found = [source.find(scene) for source in self._sources]
        height, width = (
            min(scene.images.shape[dim], max(part.masks.shape[dim] for part in found))
            for dim in (2, 3)
        )
        numbers, start = [], 0
        for source, part in zip(self._sources, found, strict=True):
            is_absent = part.concepts == UNLABELLED
            numbers.append(torch.where(is_absent, UNLABELLED, part.concepts + start))
            start += len(source.concepts)
        masks = [at_resolution(part.masks, (height, width)) for part in found]
        return ConceptMasks(torch.cat(masks, dim=1), torch.cat(numbers, dim=1))
