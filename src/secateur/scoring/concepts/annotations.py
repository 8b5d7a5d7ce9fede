"""The concept source of annotated images, whose regions come with them."""

from __future__ import annotations

from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.runtime.errors import DataError
from secateur.scoring.concepts import ConceptInput, ConceptSource


class Annotations(ConceptSource):
    """The regions of `secateur.data.annotated.AnnotatedImages`, as their batches bring them."""

    def __init__(self, concepts: tuple[Concept, ...]) -> None:
        self._concepts = concepts

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What the annotations can show."""
        return self._concepts

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return the regions that came with the images; raises `DataError` without any."""
        if concept_input.annotations is None:
            raise DataError(
                "the images come without annotated regions: take those that the concept source "
                "brings (concepts.annotated_images) as the calibration set"
            )
        return concept_input.annotations
