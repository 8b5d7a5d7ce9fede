"""Regions that come with the images: what all annotated sources have in common."""

from __future__ import annotations

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.errors import DataError
from secateur.scoring.concepts import ConceptInput, ConceptSource


class Annotations(ConceptSource):
    """The regions of `secateur.data.annotated.AnnotatedImages`, as their batches bring them."""

    def __init__(self, concepts: tuple[Concept, ...]) -> None:
        self._concepts = concepts

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What the annotations can show."""
        return self._concepts

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """The scene's own regions; raises `DataError` where it has none."""
        if scene.annotations is None:
            raise DataError(
                "the images come without annotated regions: take those that the concept source "
                "brings (concepts.annotated_images) as the calibration set"
            )
        return scene.annotations
