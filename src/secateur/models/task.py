"""What a classifier's outputs and labels mean: how they are read and compared.

Everything that compares outputs works on logits whose last axis is the class: `[image, class]`, or
`[image, label, class]` where each image has several yes-or-no labels. `Task.read` makes them from
whatever a network returns. One output `z` becomes the two logits `-z/2` and `z/2`, whose softmax is
the sigmoid of `z`, so binary and multi-label networks need no functions of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.config import TaskKind
from secateur.graph.forward import forward_of, without_forward
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.wrappers import unwrapped
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import DataError, UsageError

Scale = Literal["logits", "log-softmax", "softmax", "sigmoid"]
Logits = Float[Tensor, "_ ... class"]
"""`[image, class]` or `[image, label, class]`; batches may have different numbers of images."""
Labels = Int[Tensor, "_ ..."]
"""Class numbers `[image]`, or 0 or 1 for each label, `[image, label]`."""
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


@dataclass(frozen=True)
class Task:
    """How the outputs of a network are read; by default as logits `[image, class]`."""

    kind: TaskKind = "single-label"
    scale: Scale = "logits"
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What to tell the user of it."""

    @property
    def accuracy_name(self) -> str:
        """What `Score.top1_fraction` is called in tables."""
        return {
            "single-label": "top-1",
            "binary": "accuracy",
            "multi-label": "label accuracy",
        }[self.kind]

    def read(self, output: object, images: int) -> Logits:
        """Return the logits in what the network returned for a number of images.

        Raises `UsageError` if there are none.
        """
        logits = as_rows(select_logits(output), images)
        if self.scale in ("softmax", "sigmoid") and logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        if self.scale == "softmax":
            logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
        elif self.scale == "sigmoid":
            logits = logits.logit(torch.finfo(logits.dtype).eps)
        if self.kind == "single-label":
            return logits
        both = torch.stack([-logits / 2, logits / 2], dim=-1)  # [image, label, class]
        return both[:, 0] if self.kind == "binary" else both

    def concept_count(self, output: Node) -> int:
        """Return how many classes or labels images may show: those of `evidence`."""
        value = output.meta["val"]
        return 2 if self.kind == "binary" else int(as_rows(value, len(value)).shape[1])

    def concept_rows(self, weight: Float[Tensor, "output feature"]) -> Tensor:
        """Return a last linear layer's weights for each class or label, see `concept_count`."""
        return torch.cat([-weight, weight]) if self.kind == "binary" else weight

    def evidence(
        self, logits: Logits, labels: Int[Tensor, "image *label"] | None
    ) -> tuple[Float[Tensor, "image"], Int[Tensor, "image"]]:
        """Return the logit of one class or label for each image, and its number.

        It is that of the true class, or without labels of the predicted one. Of several labels it
        is the one that the network is surest of, among the true ones if labels are passed.
        """
        if self.kind != "multi-label":
            classes = predict(logits) if labels is None else labels
            check_labels(classes, logits.shape[-1])
            return logits.gather(1, classes[:, None])[:, 0], classes
        sure = logits[..., 1]  # [image, label]
        candidates = sure.detach()
        if labels is not None:
            is_out = (labels == 0) & (labels == 1).any(1, keepdim=True)
            candidates = candidates.masked_fill(is_out, -torch.inf)
        numbers = candidates.argmax(1)
        return sure.gather(1, numbers[:, None])[:, 0], numbers


SINGLE_LABEL = Task()
"""One logit for each class, and one class for each image."""


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise `DataError` if a label lies outside the network's classes."""
    outside = labels[(labels < 0) | (labels >= classes)]
    if not len(outside):
        return
    hint = ""
    if int(labels.min()) < 0:
        hint = ": leave out images without a label"
    elif int(labels.min()) >= 1 and int(labels.max()) == classes:
        hint = f": subtract 1 from labels that count from 1 to {classes}"
    raise DataError(
        f"the data has a label {int(outside[0])}, but the network has {classes} classes, "
        f"0 to {classes - 1}{hint}"
    )


def predict(logits: Logits) -> Labels:
    """Return the predicted class of each image, or 0 or 1 for each of its labels."""
    return logits.detach().argmax(-1)


def cross_entropy(
    logits: Logits,
    labels: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats, over images and labels.

    `labels` are class numbers `[image, *label]`, or fractions `[image, class]`. Raises `DataError`
    if a class number is not one of the network's.
    """
    if not labels.is_floating_point():
        if labels.shape != logits.shape[:-1]:
            raise DataError(
                f"labels {list(labels.shape)} don't fit logits {list(logits.shape)}: each image "
                "needs one class number, or 0 or 1 for each label of a multi-label network"
            )
        check_labels(labels, logits.shape[-1])
        labels = labels.flatten()
    if logits.ndim > 2:
        logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)


def softened_divergence(logits: Logits, expected: Logits, temperature: float) -> Float[Tensor, ""]:
    """Return KL(expected ‖ logits) of softened outputs in nats, a mean over images and labels."""
    if logits.ndim > 2:
        logits, expected = logits.flatten(0, -2), expected.flatten(0, -2)
    return F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(expected / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def select_logits(output: object) -> Tensor:
    """Return the tensor of logits in a network's output.

    It is the output itself, its `logits`, the only tensor of a mapping, or the first of a tuple.
    Raises `UsageError` if there is none.
    """
    if isinstance(output, Tensor):
        return output
    logits: object = getattr(output, "logits", None)
    what = type(output).__name__
    if isinstance(output, Mapping):
        logits = next(iter(output.values())) if len(output) == 1 else output.get("logits")
        what += f" of {', '.join(map(str, output))}"
    elif isinstance(output, tuple | list) and output and not isinstance(logits, Tensor):
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    raise UsageError(
        f"the network must return logits [image, class]; it returns {what}, which has no logits"
    )


def as_rows(output: Tensor, images: int) -> Float[Tensor, "image output"]:
    """Return `[image, output]` of a tensor that may lack one of the axes, or have more of size 1.

    Raises `UsageError` if it has other axes.
    """
    if output.ndim == 2 and len(output) == images:
        return output
    if output.ndim == 1 and len(output) == images:
        return output[:, None]
    if images == 1 and output.ndim <= 1:
        return output.reshape(1, -1)
    if output.ndim > 2 and len(output) == images and output[0, :].numel() == output.shape[1]:
        return output.flatten(1)
    has_map = output.ndim == 4 and len(output) == images
    hint = " (one for each position: segmentation is not supported)" if has_map else ""
    raise UsageError(
        f"the network must return logits [image, class]; for {images} images it returns "
        f"{list(output.shape)}{hint}"
    )


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


@dataclass(frozen=True)
class Outputs:
    """What a network's first outputs show."""

    columns: int
    """Numbers for each image."""
    scale: Scale
    notes: tuple[str, ...]


def examine_outputs(model: nn.Module, images: Float[Tensor, "image ..."]) -> Outputs:
    """Run the network on a few of the images, and return how its outputs look.

    Raises `UsageError` if they are not numbers for each image.
    """
    images, network = images[:FIRST_IMAGES].detach(), unwrapped(model)
    try:
        with torch.enable_grad():
            # A copy, since a network may write into its input, which a leaf of autograd forbids.
            output = run_network(network, images.clone().requires_grad_().clone())
    except UsageError:  # some networks run only without gradients
        with torch.no_grad():
            output = run_network(network, images.clone())
    logits = select_logits(output)
    rows = as_rows(logits, len(images)).detach().float()
    scale = _scale(logits, rows)
    notes = _container_notes(model, images)
    if scale in ("softmax", "sigmoid"):
        notes.append(
            f"The network ends in a {scale}: it is undone where logits are needed, as in the loss."
        )
    return Outputs(rows.shape[1], scale, tuple(notes))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits among what a network returns for images; see `select_logits`."""
    return select_logits(model(images))


def _container_notes(model: nn.Module, images: Tensor) -> list[str]:
    """Return what to say of a network that runs through `logits_of`."""
    if forward_of(model) is not logits_of:
        return []
    with torch.no_grad():
        output = run_network(without_forward(model), images)
    name = type(output).__name__
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        where = f"in the {name}"
    else:
        assert isinstance(output, tuple | list)
        where = f"the first of the {len(output)} entries of the {name}"
    return [
        f"The network's logits are {where} that it returns; what else it returns may lose channels."
    ]


def _scale(logits: Tensor, rows: Float[Tensor, "image output"]) -> Scale:
    """Return what kind of numbers a network returns, from their values and how they were made."""
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
) -> Task:
    """Return what the network's outputs for a few images and all the labels mean.

    Raises `UsageError`, `DataError` or `NotFiniteError` where they don't go together.
    """
    return make_task(examine_outputs(model, images), labels, kind)


def make_task(
    outputs: Outputs,
    labels: Sequence[Labels] = (),
    kind: TaskKind | Literal["auto"] = "auto",
) -> Task:
    """Return how to read outputs, in view of all the labels that they will be compared with.

    Raises `UsageError` if labels of the `kind` can't be read from such outputs, and `DataError` if
    labels don't fit the outputs.
    """
    labels = [part for part in labels if len(part)]
    if kind == "auto":
        several = labels[0].ndim == 2 if labels else outputs.scale == "sigmoid"
        kind = "binary" if outputs.columns == 1 else "multi-label" if several else "single-label"
    if (kind == "binary") != (outputs.columns == 1):
        raise UsageError(
            f"model.task = {kind!r}, but the network has {outputs.columns} outputs: a binary task "
            "has one, the others have more"
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
