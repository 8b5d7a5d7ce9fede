"""Where the semantic parts of an image are.

A concept source is shown a scene, a batch of images with what the network made of them, and gives
masks: for each image one or more regions, each with the number of the concept that it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.data.annotated import AnnotatedFiles, AnnotatedImages, join_annotations
from secateur.data.concept_masks import Concept, ConceptMasks
from secateur.data.preprocessing import Preprocessing
from secateur.errors import DataError, UnknownName, UsageError
from secateur.graph.trace import NetworkGraph, Tensors


@dataclass(frozen=True, eq=False)
class ConceptInput:
    """A batch of images and what the network made of them."""

    images: Float[Tensor, "image rgb height width"]
    """Normalised, as the network got them."""
    indices: Int[Tensor, "image"]
    """Number of each image in the calibration set."""
    labels: Int[Tensor, "image"] | None
    """The true classes, where they may be used."""
    annotations: ConceptMasks | None
    """Regions that came with the images."""
    value: Float[Tensor, "image channel h w"] | None
    """What the source's `node` gave. A leaf that the logits can be derived by where the source
    `needs_gradient`, else detached."""
    logits: Float[Tensor, "image class"]


@runtime_checkable
class ConceptSource(Protocol):
    """A scene in, masks out.

    One that derives from this class looks at the images alone and learns nothing, but for what it
    says otherwise.
    """

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every concept that the masks can show, in the order of their numbers."""

    @property
    def node(self) -> Node | None:
        """The value of the network that `Scene.value` must hold, if any."""
        return None

    @property
    def needs_gradient(self) -> bool:
        """Whether the logits must be derivable by `Scene.value`."""
        return False

    @property
    def needs_learning(self) -> bool:
        """Whether `learn` wants to be shown a sample of the images before the first `find`."""
        return False

    def learn(self, scene: ConceptInput) -> None:
        """Takes in a part of the sample; called in no fixed order of images."""
        return

    def finish_learning(self) -> None:
        """Called once, after the last `learn`."""
        return

    def find(self, scene: ConceptInput) -> ConceptMasks:
        """The concept masks of a batch, each image's independent of the others'."""


@dataclass(frozen=True, eq=False)
class SourceContext:
    """What a concept source is made for."""

    graph: NetworkGraph
    state: Tensors
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    argument: str
    """What follows the colon in the source's name: a number, a folder, or nothing."""


SourceFactory = Callable[[SourceContext], ConceptSource]


def sources() -> dict[str, SourceFactory]:
    """Every concept source by name, made for a network and its data."""
    from secateur.scoring.concepts.annotations import Annotations
    from secateur.scoring.concepts.colours import Colours
    from secateur.scoring.concepts.evidence import Evidence
    from secateur.scoring.concepts.factors import Factors
    from secateur.scoring.concepts.saliency import Saliency

    def annotated(read: Callable[[Path], AnnotatedFiles]) -> SourceFactory:
        return lambda context: Annotations(read(Path(context.argument)).concepts)

    return {
        "evidence": Evidence,
        "saliency": Saliency,
        "factors": Factors,
        "colours": Colours,
        **{name: annotated(read) for name, read in readers().items()},
    }


def readers() -> dict[str, Callable[[Path], AnnotatedFiles]]:
    """The sources that bring images of their own, by name: each reads a folder."""
    from secateur.scoring.concepts.broden import read_broden
    from secateur.scoring.concepts.cub import read_boxes, read_parts
    from secateur.scoring.concepts.masks import read_masks

    return {"masks": read_masks, "broden": read_broden, "parts": read_parts, "boxes": read_boxes}


def parse(text: str) -> list[tuple[str, str]]:
    """Name and argument of each source in a text such as `evidence,factors:8` or `masks:DIR`.

    The name of a folder can't hold a comma. No folder is looked into. Raises `UnknownName`, or
    `UsageError` where an argument is missing, wrong or too many.
    """
    from secateur.scoring.concepts.factors import factor_count

    found = []
    for part in text.split(","):
        name, colon, argument = part.strip().partition(":")
        if name not in sources():
            raise UnknownName("concept source", name, sources())
        if name in readers():
            if not argument:
                raise UsageError(f"the concept source {name!r} needs a folder: {name}:DIR")
        elif name == "factors":
            factor_count(argument)
        elif colon:
            raise UsageError(f"the concept source {name!r} takes nothing after a colon: {part!r}")
        found.append((name, argument))
    if len(set(found)) < len(found):
        raise UsageError(f"the concept sources {text!r} name one twice")
    return found


def make(
    text: str,
    graph: NetworkGraph,
    state: Tensors,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
) -> ConceptSource:
    """The source or the combination of sources that a text names; see `parse`.

    Annotated sources are one, in the place of the first of them: they must bring the same images,
    whose batches hold the regions of all. Raises as `parse` and `annotated_images` do.
    """
    from secateur.scoring.concepts.annotations import Annotations
    from secateur.scoring.concepts.combined import Combined

    made: list[ConceptSource] = []
    has_annotations = False
    for name, argument in parse(text):
        if name not in readers():
            context = SourceContext(graph, state, class_names, preprocessing, argument)
            made.append(sources()[name](context))
        elif not has_annotations:
            images = annotated_images(text)
            assert images is not None
            made.append(Annotations(images.concepts))
            has_annotations = True
    return made[0] if len(made) == 1 else Combined(tuple(made))


def annotated_images(text: str) -> AnnotatedImages | None:
    """The images that the annotated sources in a text bring, if there are any.

    Raises `UsageError` where they bring different ones, and `DataError`.
    """
    found = []
    for name, argument in parse(text):
        if name not in readers():
            continue
        if not Path(argument).is_dir():
            raise DataError(f"no folder {argument} to read {name} from")
        found.append(readers()[name](Path(argument)))
    return join_annotations(found) if found else None
