"""Several concept sources as one."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks, at_resolution
from secateur.scoring.concepts import ConceptInput, ConceptSource


class Combined:
    """The regions of several sources side by side; their concepts follow one another.

    All sources that need a node must need the same one.
    """

    def __init__(self, sources: tuple[ConceptSource, ...]) -> None:
        self._sources = sources
        nodes = {source.node for source in sources if source.node is not None}
        assert len(nodes) <= 1, f"sources that need different nodes: {nodes}"
        self._node = next(iter(nodes), None)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The concepts of all sources, one source after the other."""
        return tuple(concept for source in self._sources for concept in source.concepts)

    @property
    def node(self) -> Node | None:
        """The node that any of the sources needs."""
        return self._node

    @property
    def needs_gradient(self) -> bool:
        """Whether any of the sources needs it."""
        return any(source.needs_gradient for source in self._sources)

    @property
    def needs_learning(self) -> bool:
        """Whether any of the sources needs it."""
        return any(source.needs_learning for source in self._sources)

    def learn(self, concept_input: ConceptInput) -> None:
        """Pass the batch to the sources that learn."""
        for source in self._sources:
            if source.needs_learning:
                source.learn(concept_input)

    def finish_learning(self) -> None:
        """Finish learning for the sources that learn."""
        for source in self._sources:
            if source.needs_learning:
                source.finish_learning()

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return every source's regions, at the finest source's resolution or the images'."""
        parts = [source.find(concept_input) for source in self._sources]
        height, width = (
            min(concept_input.images.shape[dim], max(part.masks.shape[dim] for part in parts))
            for dim in (2, 3)
        )
        concepts, start = [], 0
        for source, part in zip(self._sources, parts, strict=True):
            is_absent = part.concepts == UNLABELLED
            concepts.append(torch.where(is_absent, UNLABELLED, part.concepts + start))
            start += len(source.concepts)
        masks = [at_resolution(part.masks, (height, width)) for part in parts]
        return ConceptMasks(torch.cat(masks, dim=1), torch.cat(concepts, dim=1))
