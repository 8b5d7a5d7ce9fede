"""How a network's outputs look on a few images, and which task they and the labels belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.config import TaskKind
from secateur.data.images import IGNORED
from secateur.graph.forward import forward_of, inputs_of, with_inputs, without_forward
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.output_values import OutputPart, floating_leaves, measured
from secateur.graph.wrappers import unwrapped
from secateur.models.task import (
    Labels,
    Scale,
    Task,
    as_rows,
    check_labels,
    select_logits,
)
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import DataError, UsageError

Form = Literal["rows", "maps", "values"]
"""One row of class scores for each image, a map of them, or anything else."""
FIRST_IMAGES = 4
"""Images that are enough to tell how outputs are to be read."""
SUM_TOLERANCE, COARSE_SUM_TOLERANCE = 1e-4, 2e-2
"""How far from 1 the sum of probabilities may be, in float32 and in types of half its size."""
VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze"),
        *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
) | {"SqueezeBackward1", "SqueezeBackward2"}
"""Steps of autograd that leave values as they are."""


def run_network(model: nn.Module, images: Tensor) -> object:
    """Return what the network returns in evaluation mode, computed on its device.

    Raises `UsageError` where it fails.
    """
    images = as_input(model, images)
    try:
        with evaluating(model):
            output: object = model(images)
    except Exception as error:
        if explain(error) is not None:  # the machine's fault, not the network's
            raise
        shape, words = list(images.shape), " ".join(str(error).split())
        raise UsageError(f"the network can't be run on images {shape}: {words}") from error
    return output


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network's first outputs show."""

    form: Form
    columns: int
    """Numbers for each image, or for each position of a map; 0 for other values."""
    scale: Scale
    notes: tuple[str, ...]
    leaves: Sequence[Tensor] = ()
    """The tensors that can be compared as values."""
    is_picture: bool = False
    """Whether a map has the channels, height and width of the images."""


def examine_outputs(model: nn.Module, images: Float[Tensor, "image ..."]) -> Outputs:
    """Run the network on a few of the images, and return how its outputs look.

    Raises `UsageError` if it returns nothing that can be compared.
    """
    images, network = images[:FIRST_IMAGES].detach(), unwrapped(model)
    try:
        with torch.enable_grad():
            # A copy, since a network may write into its input, which a leaf of autograd forbids.
            output = run_network(network, images.clone().requires_grad_().clone())
    except UsageError:  # some networks run only without gradients
        with torch.no_grad():
            output = run_network(network, images.clone())
    leaves = [leaf.detach().cpu() for leaf in floating_leaves(output, len(images))]
    form = form_of_outputs(output, len(images))
    if form == "values":
        return Outputs(form, 0, "logits", tuple(_container_notes(model, images)), leaves)
    logits = select_logits(output)
    if form == "rows":
        rows = as_rows(logits, len(images)).detach().float()
    else:
        rows = logits.detach().movedim(1, -1).flatten(0, -2).float()
    scale = _scale(logits, rows)
    notes = _container_notes(model, images)
    if scale in ("softmax", "sigmoid"):
        notes.append(
            f"The network ends in a {scale}: it is undone where logits are needed, as in the loss."
        )
    is_picture = form == "maps" and logits.shape == images.shape
    return Outputs(form, rows.shape[1], scale, tuple(notes), leaves, is_picture)


def form_of_outputs(output: object, images: int) -> Form:
    """Return what form the output for a number of images has.

    Raises `UsageError` if it is one tensor that has no row for each image, or no tensor.
    """
    leaves = floating_leaves(output, images)
    try:
        logits = select_logits(output)
    except UsageError:
        if any(leaf.ndim > 2 for leaf in leaves):
            return "values"
        raise
    if logits.ndim > 2 and len(logits) == images and logits[0, 0].numel() > 1:
        is_named = isinstance(output, Tensor) or not isinstance(output, tuple | list)
        return "maps" if is_named else "values"
    as_rows(logits, images)
    return "rows"


def logits_of(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Return the logits among what a network returns for its inputs; see `select_logits`."""
    return select_logits(model(*inputs, **named))


def _container_notes(model: nn.Module, images: Tensor) -> list[str]:
    """Return what to say of a network that runs through `logits_of`."""
    if forward_of(model) is not logits_of:
        return []
    with torch.no_grad():
        output = run_network(with_inputs(without_forward(model), inputs_of(model)), images)
    name = type(output).__name__
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        where = f"in the {name}"
    else:
        assert isinstance(output, tuple | list)
        where = f"the first of the {len(output)} entries of the {name}"
    return [
        f"The network's logits are {where} that it returns; what else it returns may lose channels."
    ]


def _scale(logits: Tensor, rows: Float[Tensor, "row output"]) -> Scale:
    """Return what kind of numbers a network returns, from their values and how they were made.

    A row holds the numbers of one image, or of one position.
    """
    step = logits.grad_fn
    while step is not None and step.name() in VIEWS:
        step = step.next_functions[0][0]
    if step is not None and step.name() == "SigmoidBackward0":
        return "sigmoid"
    if rows.shape[1] == 1:
        return "logits"
    tolerance = SUM_TOLERANCE if logits.dtype == torch.float32 else COARSE_SUM_TOLERANCE
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < tolerance).all()):
        return "softmax"
    is_log = bool((rows <= 0).all()) and bool((rows.logsumexp(1).abs() < tolerance).all())
    return "log-softmax" if is_log else "logits"


def find_task(
    model: nn.Module,
    images: Float[Tensor, "image ..."],
    labels: Sequence[Labels] = (),
    kind: TaskKind | Literal["auto"] = "auto",
    *,
    parts: Sequence[OutputPart] = (),
    has_labels: bool = True,
) -> Task:
    """Return what the network's outputs for a few images and all the labels mean.

    `parts` are what is compared in detection and regression; by default all tensors. Raises
    `UsageError`, `DataError` or `NotFiniteError` where they don't go together.
    """
    outputs = examine_outputs(model, images)
    return make_task(outputs, labels, kind, parts=parts, has_labels=has_labels)


def make_task(
    outputs: Outputs,
    labels: Sequence[Labels] = (),
    kind: TaskKind | Literal["auto"] = "auto",
    *,
    parts: Sequence[OutputPart] = (),
    has_labels: bool = True,
) -> Task:
    """Return how to read outputs, in view of all the labels that they will be compared with.

    Raises `UsageError` if labels of the `kind` can't be read from such outputs, and `DataError` if
    labels don't fit the outputs.
    """
    labels = [part for part in labels if len(part)] if has_labels else []
    if kind == "auto":
        kind = _kind_of(outputs, labels, has_parts=bool(parts))
    if kind in ("detection", "regression"):
        return _values_task(kind, outputs, parts, has_labels=has_labels)
    if parts:
        raise UsageError(
            f"outputs= says what is compared in detection and regression, not in {kind}: leave it "
            "out, or set task"
        )
    if kind == "segmentation":
        return _segmentation_task(outputs, labels, has_labels=has_labels)
    return replace(_class_task(kind, outputs, labels), has_labels=has_labels)


def _kind_of(outputs: Outputs, labels: Sequence[Labels], *, has_parts: bool) -> TaskKind:
    is_numbers = bool(labels) and labels[0].is_floating_point()
    if has_parts or outputs.form == "values" or is_numbers:
        return "regression"
    if outputs.form == "maps":
        is_pixels = bool(labels) and labels[0].ndim > 1
        is_map = outputs.columns > 1 and not outputs.is_picture
        return "segmentation" if is_pixels or is_map else "regression"
    if outputs.columns == 1:
        return "binary"
    several = labels[0].ndim == 2 if labels else outputs.scale == "sigmoid"
    return "multi-label" if several else "single-label"


def _values_task(
    kind: TaskKind, outputs: Outputs, parts: Sequence[OutputPart], *, has_labels: bool
) -> Task:
    """Return the task of outputs that are compared as values."""
    wanted = parts or [OutputPart(leaf) for leaf in range(len(outputs.leaves))]
    varying = measured(wanted, outputs.leaves)
    notes = [*(note for note in outputs.notes if "it is undone" not in note)]
    shapes = [list(outputs.leaves[part.leaf].shape[1:]) for part in varying]
    if not parts:
        notes.append(
            f"Outputs of one image, {' and '.join(map(str, shapes))}, are compared as values, by "
            "their squared error over their variance."
        )
    elif len(varying) < len(parts):
        notes.append(
            f"{len(parts) - len(varying)} of the {len(parts)} parts of the outputs do not count: "
            "on the first images they are the same everywhere, or their objectness is 0."
        )
    return Task(
        kind,
        parts=varying,
        notes=tuple(notes),
        has_labels=has_labels,
        metric_unit="",
    )


def _segmentation_task(outputs: Outputs, labels: Sequence[Labels], *, has_labels: bool) -> Task:
    """Return the task of a network that returns a class for each position."""
    if outputs.form != "maps":
        raise UsageError(
            "model.task (--task) = 'segmentation', but the network returns no map of class scores "
            "[image, class, height, width]"
        )
    classes = max(2, outputs.columns)
    for part in labels:
        if part.ndim < 2:
            raise DataError(
                f"labels are {list(part.shape)}, but the network returns class scores for each "
                "position: give masks [image, height, width], or leave the labels out (--data "
                "images:DIR)"
            )
        check_labels(part[part != IGNORED], classes)
    notes = list(outputs.notes)
    if outputs.columns == 1:
        notes.append("The network has one output a position: above 0 it means class 1.")
    elif not labels:
        notes.append(
            f"The network's {outputs.columns} channels are read as one logit for each class, at "
            "each position (model.task, --task, says otherwise)."
        )
    return Task("segmentation", outputs.scale, tuple(notes), has_labels=has_labels)


def _class_task(kind: TaskKind, outputs: Outputs, labels: Sequence[Labels]) -> Task:
    """Return the task of a classifier."""
    if outputs.form != "rows":
        raise UsageError(
            f"model.task (--task) = {kind!r}, but the network returns more than one row of class "
            "scores for each image: 'segmentation' reads a map of them, 'regression' compares any "
            "values"
        )
    if (kind == "binary") != (outputs.columns == 1):
        raise UsageError(
            f"model.task (--task) = {kind!r}, but the network has {outputs.columns} outputs: a "
            "binary task has one, the others have more"
        )
    if kind == "multi-label" and outputs.scale in ("softmax", "log-softmax"):
        raise UsageError(
            f"each image has several labels, but the network ends in a {outputs.scale}, which "
            "chooses one: end it with logits or a sigmoid"
        )
    for part in labels:
        expected = [len(part), outputs.columns] if kind == "multi-label" else [len(part)]
        if list(part.shape) != expected:
            raise DataError(
                f"labels are {list(part.shape)}, but a {kind} network with {outputs.columns} "
                f"outputs needs {expected}"
            )
        check_labels(part, outputs.columns if kind == "single-label" else 2)
    notes = list(outputs.notes)
    if kind == "binary":
        notes.append("The network has one output: above 0 it means class 1, else class 0.")
    elif kind == "multi-label":
        notes.append(
            f"Each of the {outputs.columns} outputs is a label of its own, present above 0: "
            "accuracy is the fraction of labels that are right."
        )
    return Task(kind, outputs.scale, tuple(notes))
