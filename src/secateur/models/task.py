"""What a network's outputs and labels mean: how they are read and compared.

Everything that compares outputs works on what `Task.read` makes of whatever a network returns:

- logits whose last axis is the class: `[image, class]`, `[image, label, class]` where each image
  has several yes-or-no labels, or `[image, position, class]` in segmentation. One output `z`
  becomes the two logits `-z/2` and `z/2`, whose softmax is the sigmoid of `z`, so binary and
  multi-label networks need no functions of their own;
- or values `[image, value]`, for all other outputs: see `output_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.fx.node import Node

from secateur.config import TaskKind
from secateur.data.images import IGNORED
from secateur.graph.output_values import OutputPart, floating_leaves
from secateur.models.score import MetricUnit, metric_text
from secateur.runtime.errors import DataError, UsageError

Scale = Literal["logits", "log-softmax", "softmax", "sigmoid"]
Reading = Float[Tensor, "_ ... last"]
"""Logits `[image, class]`, `[image, label, class]` or `[image, position, class]`, or values
`[image, value]`; batches may have different numbers of images."""
Logits = Reading
Labels = Num[Tensor, "_ ..."]
"""Class numbers `[image]`, 0 or 1 for each label, `[image, label]`, class numbers `[image, height,
width]` with `IGNORED` for positions that don't count, or values."""
MOST_POSITIONS = 4096
"""Positions that segmentations are compared at in each image, at most: a regular sample."""


@dataclass(frozen=True)
class Task:
    """How the outputs of a network are read; by default as logits `[image, class]`."""

    kind: TaskKind = "single-label"
    scale: Scale = "logits"
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What to tell the user of it."""
    parts: tuple[OutputPart, ...] = ()
    """What is compared as values; empty if the outputs are class scores."""
    has_labels: bool = True
    """Whether there is anything to compare outputs with but the original network's."""
    metric_name: str = ""
    """What `Score.metric` is, if it is no accuracy."""
    metric_unit: MetricUnit = "%"

    @property
    def accuracy_name(self) -> str:
        """What `Score.metric` is called in tables."""
        if not self.has_metric:
            return "agreement"
        return (
            self.metric_name
            or {
                "single-label": "top-1",
                "binary": "accuracy",
                "multi-label": "label accuracy",
                "segmentation": "pixel accuracy",
                "detection": "R²",
                "regression": "R²",
            }[self.kind]
        )

    def describe(self, metric: float) -> str:
        """Return a metric with its name and unit: `top-1 91.20 %`."""
        return f"{self.accuracy_name} {metric_text(metric, self.metric_unit)}"

    @property
    def has_metric(self) -> bool:
        """Whether scores are more than agreement with the original network."""
        return self.has_labels or bool(self.metric_name)

    @property
    def is_values(self) -> bool:
        """Whether outputs are compared as values, not as class scores."""
        return self.kind in ("detection", "regression")

    def read(self, output: object, images: int) -> Reading:
        """Return the logits or values in what the network returned for a number of images.

        Segmentations are read at a sample of their positions. Raises `UsageError` if there are no
        logits or values.
        """
        if self.is_values:
            leaves = floating_leaves(output, images)
            return torch.cat([part.read(leaves) for part in self.parts], dim=1)
        if self.kind == "segmentation":
            logits = self.read_maps(output).flatten(2)  # [image, class, position]
            return logits[..., :: _step(logits.shape[-1])].transpose(1, 2)
        logits = self._as_logits(as_rows(select_logits(output), images))
        if self.kind == "single-label":
            return logits
        both = torch.stack([-logits / 2, logits / 2], dim=-1)  # [image, label, class]
        return both[:, 0] if self.kind == "binary" else both

    def read_maps(self, output: object) -> Float[Tensor, "image class ..."]:
        """Return the logits of a segmentation at every position; one channel becomes two classes.

        Raises `UsageError` if the output has no maps.
        """
        logits = select_logits(output)
        if logits.ndim < 3:
            raise UsageError(
                "a segmentation network must return logits [image, class, height, width]; it "
                f"returns {list(logits.shape)}"
            )
        logits = self._as_logits(logits)
        if logits.shape[1] == 1:
            return torch.cat([-logits / 2, logits / 2], dim=1)
        return logits

    def _as_logits(self, scores: Tensor) -> Tensor:
        """Undo the softmax or sigmoid that the network ends in."""
        if self.scale in ("softmax", "sigmoid") and scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        if self.scale == "softmax":
            return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        if self.scale == "sigmoid":
            return scores.logit(torch.finfo(scores.dtype).eps)
        return scores

    def read_labels(self, labels: Labels, output: object) -> Labels:
        """Return labels beside the reading of an output, `IGNORED` where they don't count.

        Masks are read at the positions of the output, whose size may be another; numbers for a
        regression as the output is.
        """
        if self.is_values and labels.is_floating_point():
            leaf = floating_leaves(output, len(labels))[0]
            if labels[0].numel() != leaf[0].numel():
                raise DataError(
                    f"labels are {list(labels.shape)}, but the network returns {list(leaf.shape)}"
                )
            return self.read(labels.reshape(leaf.shape).to(leaf), len(labels))
        if self.kind != "segmentation" or not self.has_labels:
            return labels
        size = select_logits(output).shape[2:]
        if labels.shape[1:] != size:
            labels = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
        labels = labels.flatten(1)
        return labels[:, :: _step(labels.shape[1])]

    def predict(self, reading: Reading) -> Labels:
        """Return the predicted class of each image, label or position, or the values."""
        return reading.detach() if self.is_values else predict(reading)

    def loss(self, reading: Reading, labels: Labels) -> Float[Tensor, ""]:
        """Return the loss, a sum over images: cross-entropy in nats, or half the squared error.

        Both are means over an image's positions or values. Raises `DataError` if a class number is
        not one of the network's.
        """
        if self.is_values:
            return (reading - labels.to(reading)).square().mean(1).sum() / 2
        if self.kind != "segmentation":
            return cross_entropy(reading, labels, reduction="sum")
        counts = labels != IGNORED
        total = cross_entropy(reading[counts], labels[counts], reduction="sum")
        return total * len(labels) / counts.sum().clamp_min(1)

    @property
    def has_loss(self) -> bool:
        """Whether networks can be trained on the labels."""
        return self.has_labels and self.kind != "detection"

    def training_loss(
        self, output: object, reading: Reading, labels: Labels, *, label_smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Return the mean loss to train with, for an output and its reading.

        Segmentations are compared at every position of the labels, to whose size the logits are
        resized bilinearly. Raises `DataError` if a class number is not one of the network's.
        """
        if self.is_values:
            return self.loss(reading, self.read_labels(labels, output)) / len(labels)
        if self.kind != "segmentation":
            return cross_entropy(reading, labels, label_smoothing=label_smoothing)
        logits = self.read_maps(output).float()
        if logits.shape[2:] != labels.shape[1:]:
            logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        check_labels(labels[labels != IGNORED], logits.shape[1])
        entropy = F.cross_entropy(
            logits,
            labels,
            ignore_index=IGNORED,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return entropy / (labels != IGNORED).sum().clamp_min(1)

    def own_loss(self, reading: Reading, labels: Labels | None) -> Float[Tensor, ""]:
        """Return the loss, a sum over images, with what the network itself predicts for labels.

        Of values, which it would predict without any loss, it is half their square. `labels`, if
        passed, are the labels.
        """
        if labels is not None:
            return self.loss(reading, labels)
        if self.is_values:
            return reading.square().mean(1).sum() / 2
        return self.loss(reading, self.predict(reading))

    def divergence(
        self, reading: Reading, expected: Reading, temperature: float
    ) -> Float[Tensor, ""]:
        """Return how far outputs are from the expected ones, a mean over images.

        It is KL(expected ‖ reading) of softened logits in nats, a mean over labels or positions, or
        half the squared error of values.
        """
        if self.is_values:
            return (reading - expected).square().mean() / 2
        return softened_divergence(reading, expected, temperature)

    def concept_count(self, output: Node) -> int:
        """Return how many classes or labels images may show: those of `evidence`."""
        value = output.meta["val"]
        if self.kind == "segmentation":
            return max(2, int(value.shape[1]))
        return 2 if self.kind == "binary" else int(as_rows(value, len(value)).shape[1])

    def concept_rows(self, weight: Float[Tensor, "output feature"]) -> Tensor:
        """Return a last layer's weights for each class or label, see `concept_count`."""
        is_binary = self.kind == "binary" or (self.kind == "segmentation" and len(weight) == 1)
        return torch.cat([-weight, weight]) if is_binary else weight

    def evidence(
        self, logits: Logits, labels: Int[Tensor, "image *label"] | None
    ) -> tuple[Float[Tensor, "image"], Int[Tensor, "image"]]:
        """Return the logit of one class or label for each image, and its number.

        It is that of the true class, or without labels of the predicted one. Of several labels it
        is the one that the network is surest of, among the true ones if labels are passed. In
        segmentation it is the mean logit of the class that most positions have, where they have it.
        """
        if self.kind == "segmentation":
            return _commonest(logits, predict(logits) if labels is None else labels)
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


BOXES = "pred_boxes"
"""What DETR and the detectors after it in transformers call their boxes."""
SINGLE_LABEL = Task()
"""One logit for each class, and one class for each image."""


def _commonest(
    logits: Logits, labels: Int[Tensor, "image position"]
) -> tuple[Float[Tensor, "image"], Int[Tensor, "image"]]:
    """Return the mean logit of each image's commonest class, where positions have it."""
    counts = F.one_hot(labels.clamp_min(0), logits.shape[-1]) * (labels != IGNORED)[..., None]
    classes = counts.sum(1).argmax(1)
    has_class = labels == classes[:, None]
    chosen = logits.gather(2, classes[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    return (chosen * has_class).sum(1) / has_class.sum(1).clamp_min(1), classes


def _step(positions: int) -> int:
    """Return the step between the positions that are compared."""
    return -(-positions // MOST_POSITIONS)


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

    It is the output itself, its `logits`, the `out` or the only tensor of a mapping, or the first
    of a tuple. Logits beside `pred_boxes` are those of the boxes, not of the image. Raises
    `UsageError` if there is none.
    """
    if isinstance(output, Tensor):
        return output
    logits: object = getattr(output, "logits", None)
    what = type(output).__name__
    if isinstance(output, Mapping):
        logits = output.get("logits", output.get("out"))
        if len(output) == 1:
            logits = next(iter(output.values()))
        what += f" of {', '.join(map(str, output))}"
        if BOXES in output:
            logits = None
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
    raise UsageError(
        f"the network must return logits [image, class]; for {images} images it returns "
        f"{list(output.shape)}"
    )
