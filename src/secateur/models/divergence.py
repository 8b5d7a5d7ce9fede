"""Divergence: how far a network's outputs are from another's, on images without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data import Batch
from secateur.graph.output_values import floating_leaves
from secateur.models.evaluate import read_outputs
from secateur.models.score import OutputDivergence
from secateur.models.task import SINGLE_LABEL, Reading, Task
from secateur.runtime import distributed
from secateur.runtime.device import sums_device
from secateur.runtime.errors import DataError
from secateur.runtime.torch_internals import tree_leaves

TEMPERATURE = 4.0
"""Softens the logits of `output_error`. Otherwise a few uncertain images dominate the divergence of
a network that is confident about nearly all of them."""
ROUNDING = 1e-7
"""Smaller output errors are rounding."""


def outputs_of(
    network: nn.Module, batches: Iterable[Batch], task: Task = SINGLE_LABEL
) -> tuple[Reading, ...]:
    """Return the network's logits or values in evaluation mode, a tensor for each batch.

    Each process passes its shard of the batches (`distributed.shard`) and gets those of all
    batches.
    """
    with torch.inference_mode():
        local_outputs = [read_outputs(network, batch.images, task).cpu() for batch in batches]
    return tuple(distributed.gather_shards(local_outputs))


def divergence_from(
    expected: Sequence[Reading],
    network: nn.Module,
    batches: Iterable[Batch],
    temperature: float = 1.0,
    task: Task = SINGLE_LABEL,
) -> OutputDivergence:
    """Return the divergence of `network`, in evaluation mode, from the `expected` logits.

    `expected` are those of the same batches. Both logits are softened by the temperature T, and the
    divergence is multiplied by T², as in distillation (Hinton et al., 2015). Raises `DataError`
    if there are no images.
    """
    actual = outputs_of(network, batches, task)
    divergences = divergence_by_image(expected, actual, temperature, task)
    if task.is_values:
        mean = float(divergences.mean())
        return OutputDivergence(mean, 1 - 2 * mean)
    pairs = zip(expected, actual, strict=True)
    equal = torch.cat(
        [(task.predict(mine) == task.predict(reference)).flatten() for reference, mine in pairs]
    )
    return OutputDivergence(float(divergences.mean()), int(equal.sum()) / len(equal))


def divergence_by_image(
    expected: Sequence[Reading],
    actual: Sequence[Reading],
    temperature: float = 1.0,
    task: Task = SINGLE_LABEL,
) -> Float[Tensor, "image"]:
    """Return KL(expected ‖ actual) of each image, softened as in `divergence_from`.

    Of several labels it is the sum, of several positions the mean; of values it is half their mean
    squared error. It is computed in float64: a small divergence is a small difference of large
    terms. Raises `DataError` if there are no images.
    """
    if not sum(map(len, expected)):
        raise DataError("there are no images to compare outputs on")
    pairs = zip(expected, actual, strict=True)
    if task.is_values:
        errors = (batch_actual.double() - batch_expected for batch_expected, batch_actual in pairs)
        return torch.cat([error.square().mean(1) / 2 for error in errors])
    terms = (
        F.kl_div(
            F.log_softmax(batch_actual.double() / temperature, dim=-1),
            F.log_softmax(batch_expected.double() / temperature, dim=-1),
            reduction="none",
            log_target=True,
        )
        for batch_expected, batch_actual in pairs
    )
    sums = torch.cat([batch_terms.flatten(1).sum(1) for batch_terms in terms])
    positions = expected[0].shape[1] if task.kind == "segmentation" else 1
    return temperature**2 * sums / positions


@dataclass(frozen=True, eq=False)
class DivergenceFrom:
    """Measures how far networks are from the `expected` logits, each time on the same images."""

    expected: Sequence[Reading]
    batches: Callable[[], Iterable[Batch]]
    """Returns the images; in several processes, this one's shard of them."""
    task: Task = SINGLE_LABEL

    def __call__(self, network: nn.Module) -> Float[Tensor, "image"]:
        """Return the divergence of each image; see `divergence_by_image`."""
        actual = outputs_of(network, self.batches(), self.task)
        return divergence_by_image(self.expected, actual, task=self.task)


def relative_error(actual: object, expected: object) -> float:
    """Return the largest absolute difference over the largest absolute expected value.

    Both are tensors, or structures that hold as many; then it is the largest of their errors.
    """
    pairs = zip(_tensors_in(actual), _tensors_in(expected), strict=True)
    return max(_relative_error(*pair) for pair in pairs)


def _tensors_in(output: object) -> list[Tensor]:
    leaves = tree_leaves(output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    if not actual.is_floating_point():
        actual, expected = actual.float(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def output_error(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], task: Task | None = None
) -> float:
    """Return the error of a network's outputs, a mean over images.

    It is the divergence of softened logits, as `task` reads them, or half the squared error of
    values; of a detector whose objectness is known see `_detection_error`. Without a task it is
    summed over the outputs: the divergence where an output has one row of logits for each image, or
    else the squared difference over the variance.
    """
    device = sums_device(expected[0].device)
    expected, outputs = ([t.to(device) for t in tensors] for tensors in (expected, outputs))
    if task is not None and any(part.times is not None for part in task.parts):
        return _detection_error(expected, outputs, task)
    if task is not None:
        images = len(expected[0])
        wanted_reading, reading = (
            task.read(tuple(tensors) if len(tensors) > 1 else tensors[0], images)
            for tensors in (expected, outputs)
        )
        divergence = divergence_by_image([wanted_reading], [reading], TEMPERATURE, task)
        return float(divergence.mean())
    total = 0.0
    for wanted, output in zip(expected, outputs, strict=True):
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            total += float(divergence_by_image([wanted], [output], TEMPERATURE).mean())
        else:
            error = (output - wanted).double().square().mean()
            total += float(error / wanted.double().var().clamp_min(1e-30))
    return total


def _detection_error(expected: Sequence[Tensor], outputs: Sequence[Tensor], task: Task) -> float:
    """Return how far detections are from the expected ones, summed over objects.

    It has the form of the losses that detectors are trained with, such as YOLOX's (Ge et al.,
    2021): the divergence of probabilities in nats, at each position or as often as an object is
    there, and the root mean square error of boxes there, in deviations, because their IoU falls
    linearly with it. That is multiplied by the part's weight and the expected number of objects.
    """
    total = 0.0
    images = len(expected[0])
    wanted_leaves, leaves = (floating_leaves(tuple(o), images) for o in (expected, outputs))
    for part in task.parts:
        wanted, actual = (part.compared(values).double() for values in (wanted_leaves, leaves))
        deviation = part.standard_deviation(wanted_leaves) or 1.0
        squares = ((actual - wanted) / deviation).square()
        if part.times is None:
            total += part.weight * float(squares.sum()) / 2
            continue
        objectness = part.objectness(wanted_leaves).double()
        squares = (objectness * squares).flatten(1).sum(1)
        if part.transform == "values":
            objects = objectness.flatten(1).sum(1)
            total += part.weight * float((squares * objects).sqrt().sum())
        else:
            total += part.weight * float(squares.sum()) / 2
    return total / images


def error_ratio(errors: Float[Tensor, "measurement 2"]) -> float:
    """Return output error over input error, the geometric mean of those `errors` above rounding.

    It is 0 where no error is.
    """
    ratios = [
        output / source for output, source in errors.tolist() if output > ROUNDING and source > 0
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
