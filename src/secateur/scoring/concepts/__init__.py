"""Concept sources: they find which part of an image shows which concept.

A source gets a batch of images with what the network computed for it (`ConceptInput`) and returns
masks: one or more regions for each image, each with the index of the concept that it shows.

- `evidence`: the class-evidence map (CAM or Grad-CAM), the default of classifiers
- `outputs`: the maps that a dense network returns, the default of segmentation and detection
- `saliency`: the default of all other networks
- `factors`, `colours`: other sources without annotations
- `masks`, `broden`, `cub`: annotated images from a folder, served by `annotations`
- `combined`: several sources as one
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
from secateur.graph.network_graph import NetworkGraph, Tensors
from secateur.models.task import SINGLE_LABEL, Logits, Task
from secateur.runtime.errors import DataError, UnknownName, UsageError
from secateur.runtime.local_path import check_local


@dataclass(frozen=True, eq=False)
class ConceptInput:
    """A batch of images and what the network computed for it."""

    images: Float[Tensor, "image band *position"]
    """Normalised, as the network gets them."""
    indices: Int[Tensor, "image"]
    """Index of each image in the calibration set."""
    labels: Int[Tensor, "image *label"] | None
    """The true classes or labels, if they may be used."""
    annotations: ConceptMasks | None
    """Regions that came with the images."""
    value: Float[Tensor, "image channel *cell"] | None
    """The value of the source's `node`: a leaf that the logits depend on if the source
    `needs_gradient`, else detached."""
    logits: Logits
    outputs: tuple[Tensor, ...] = ()
    """All tensors that the network returned, detached."""


@runtime_checkable
class ConceptSource(Protocol):
    """Finds the regions of concepts in a batch.

    A class that derives from this one uses the images alone and learns nothing, unless it overrides
    the members below.
    """

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """Every concept that the masks can show, by its index."""

    @property
    def node(self) -> Node | None:
        """The node whose value `ConceptInput.value` must hold, if any."""
        return None

    @property
    def needs_gradient(self) -> bool:
        """Whether gradients of the logits by `ConceptInput.value` are needed."""
        return False

    @property
    def needs_learning(self) -> bool:
        """Whether `learn` must see a sample of the images before the first `find`."""
        return False

    def learn(self, concept_input: ConceptInput) -> None:
        """Add a batch of the sample; images come in no fixed order."""
        return

    def finish_learning(self) -> None:
        """Finish learning, once, after the last `learn`."""
        return

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return the concept masks of a batch, each image's independent of the others."""


@dataclass(frozen=True, eq=False)
class SourceContext:
    """What a concept source is built from."""

    graph: NetworkGraph
    state: Tensors
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    argument: str
    """What follows the colon in the source's name: a number, a folder, or nothing."""
    task: Task = SINGLE_LABEL
    """How the network's outputs are read."""


SourceFactory = Callable[[SourceContext], ConceptSource]


def sources() -> dict[str, SourceFactory]:
    """Return a factory for every concept source, by name."""
    from secateur.scoring.concepts.annotations import Annotations
    from secateur.scoring.concepts.colours import Colours
    from secateur.scoring.concepts.evidence import Evidence
    from secateur.scoring.concepts.factors import Factors
    from secateur.scoring.concepts.outputs import Outputs
    from secateur.scoring.concepts.saliency import Saliency

    def annotated(read: Callable[[Path], AnnotatedFiles]) -> SourceFactory:
        return lambda context: Annotations(read(Path(context.argument)).concepts)

    return {
        "evidence": Evidence,
        "outputs": Outputs,
        "saliency": Saliency,
        "factors": Factors,
        "colours": Colours,
        **{name: annotated(read) for name, read in annotated_sources().items()},
    }


def annotated_sources() -> dict[str, Callable[[Path], AnnotatedFiles]]:
    """Return the readers of the annotated sources, by name: each reads a folder of images."""
    from secateur.scoring.concepts.broden import read_broden
    from secateur.scoring.concepts.cub import read_boxes, read_parts
    from secateur.scoring.concepts.masks import read_masks

    return {"masks": read_masks, "broden": read_broden, "parts": read_parts, "boxes": read_boxes}


AUTO = "auto"
"""The name that stands for the default of each kind of network, see `resolve`."""


def resolve(text: str, task: Task, graph: NetworkGraph) -> str:
    """Return the names of sources with the network's default in place of `auto`.

    That is `evidence` for classifiers, `outputs` for networks that return maps of classes or
    objects, and `saliency` for all others.
    """
    from secateur.scoring.concepts.outputs import has_maps

    if task.kind in ("single-label", "binary", "multi-label"):
        default = "evidence"
    else:
        default = "outputs" if has_maps(task, graph) else "saliency"
    return ",".join(default if part.strip() == AUTO else part for part in text.split(","))


def parse(text: str) -> list[tuple[str, str]]:
    """Return name and argument of each source in, say, `evidence,factors:8` or `masks:DIR`.

    The name of a folder can't hold a comma. No folder is read. Raises `UnknownName`, or
    `UsageError` if an argument is missing, wrong or superfluous.
    """
    from secateur.scoring.concepts.factors import factor_count

    parsed = []
    for part in text.split(","):
        name, colon, argument = part.strip().partition(":")
        if name not in sources() and name != AUTO:
            raise UnknownName("concept source", name, [AUTO, *sources()])
        if name in annotated_sources():
            if not argument:
                raise UsageError(f"the concept source {name!r} needs a folder: {name}:DIR")
        elif name == "factors":
            factor_count(argument)
        elif colon:
            raise UsageError(f"the concept source {name!r} takes nothing after a colon: {part!r}")
        parsed.append((name, argument))
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"the concept sources {text!r} name one twice")
    return parsed


def make(
    text: str,
    graph: NetworkGraph,
    state: Tensors,
    class_names: tuple[str, ...],
    preprocessing: Preprocessing,
    task: Task = SINGLE_LABEL,
) -> ConceptSource:
    """Return the source, or the combination of sources, that a text names; see `parse`, `resolve`.

    Annotated sources count as one, in the place of the first: they must bring the same images,
    whose batches hold the regions of all. Raises what `parse` and `annotated_images` raise.
    """
    from secateur.scoring.concepts.annotations import Annotations
    from secateur.scoring.concepts.combined import Combined

    made: list[ConceptSource] = []
    has_annotations = False
    for name, argument in parse(resolve(text, task, graph)):
        if name not in annotated_sources():
            context = SourceContext(graph, state, class_names, preprocessing, argument, task)
            made.append(sources()[name](context))
        elif not has_annotations:
            images = annotated_images(text)
            assert images is not None
            made.append(Annotations(images.concepts))
            has_annotations = True
    return made[0] if len(made) == 1 else Combined(tuple(made))


def annotated_images(text: str) -> AnnotatedImages | None:
    """Return the images that the annotated sources in a text bring, or None.

    Raises `UsageError` if they bring different images, and `DataError`.
    """
    image_sets = []
    for name, argument in parse(text):
        if name not in annotated_sources():
            continue
        check_local(argument)
        if not Path(argument).is_dir():
            raise DataError(f"no folder {argument} to read {name} from")
        image_sets.append(annotated_sources()[name](Path(argument)))
    return join_annotations(image_sets) if image_sets else None
