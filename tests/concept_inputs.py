"""Make the inputs of concept sources by hand, from a network and images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import random_images
from secateur.data.concept_masks import ConceptMasks
from secateur.data.preprocessing import Preprocessing
from secateur.graph.interpreter import run
from secateur.graph.module_state import tensors_of
from secateur.graph.trace import trace
from secateur.models.task import SINGLE_LABEL, Task
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext

CLASS_NAMES = ("ant", "bee", "cow", "dog", "elk")
PREPROCESSING = Preprocessing(8, 8)


def context_of(model: nn.Module, argument: str = "", task: Task = SINGLE_LABEL) -> SourceContext:
    graph = trace(model, random_images(2))
    return SourceContext(graph, tensors_of(model), CLASS_NAMES, PREPROCESSING, argument, task)


def concept_input_of(
    source: ConceptSource,
    context: SourceContext,
    images: Tensor,
    labels: Tensor | None = None,
    annotations: ConceptMasks | None = None,
) -> ConceptInput:
    """The images, numbered from 0 on, with what the source's node gives for them."""
    seen: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        seen.append(value.detach().requires_grad_(source.needs_gradient))
        return seen[0]

    after = {} if source.node is None else {source.node: keep}
    with torch.set_grad_enabled(source.needs_gradient):
        output = run(context.graph, context.state, images, after=after)
    return ConceptInput(
        images,
        torch.arange(len(images)),
        labels,
        annotations,
        seen[0] if seen else None,
        context.task.read(output, len(images)),
        (output.detach(),),
    )


def select_inputs(concept_input: ConceptInput, images: slice) -> ConceptInput:
    """Some images of a concept_input whose value needs no gradient."""
    annotations = concept_input.annotations
    return ConceptInput(
        concept_input.images[images],
        concept_input.indices[images],
        None if concept_input.labels is None else concept_input.labels[images],
        None
        if annotations is None
        else ConceptMasks(annotations.masks[images], annotations.concepts[images]),
        None if concept_input.value is None else concept_input.value[images].clone(),
        concept_input.logits[images],
        tuple(output[images] for output in concept_input.outputs),
    )
