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
from secateur.models.evaluate import compute_logits
from secateur.models.score import OutputDivergence
from secateur.models.task import SINGLE_LABEL, Logits, Task, predict
from secateur.runtime import distributed
from secateur.runtime.errors import DataError

TEMPERATURE = 4.0
"""Softens the logits of `output_error`. Otherwise a few uncertain images dominate the divergence of
a network that is confident about nearly all of them."""
ROUNDING = 1e-7
"""Smaller output errors are rounding."""


def logits_of(
    network: nn.Module, batches: Iterable[Batch], task: Task = SINGLE_LABEL
) -> tuple[Logits, ...]:
    """Return the network's logits in evaluation mode, a tensor for each batch.

    Each process passes its shard of the batches (`distributed.shard`) and gets the logits of
    all batches.
    """
    with torch.inference_mode():
        local_logits = [compute_logits(network, batch.images, task).cpu() for batch in batches]
    return tuple(distributed.gather_shards(local_logits))


def divergence_from(
    expected: Sequence[Logits],
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
    actual = logits_of(network, batches, task)
    divergences = divergence_by_image(expected, actual, temperature)
    pairs = zip(expected, actual, strict=True)
    equal = torch.cat(
        [(predict(mine) == predict(reference)).flatten() for reference, mine in pairs]
    )
    return OutputDivergence(float(divergences.mean()), int(equal.sum()) / len(equal))


def divergence_by_image(
    expected: Sequence[Logits], logits: Sequence[Logits], temperature: float = 1.0
) -> Float[Tensor, "image"]:
    """Return KL(expected ‖ logits) of each image, softened as in `divergence_from`.

    Of several labels it is the sum. It is computed in float64: a small divergence is a small
    difference of large terms. Raises `DataError` if there are no images.
    """
    if not sum(map(len, expected)):
        raise DataError("there are no images to compare outputs on")
    terms = (
        F.kl_div(
            F.log_softmax(batch_logits.double() / temperature, dim=-1),
            F.log_softmax(batch_expected.double() / temperature, dim=-1),
            reduction="none",
            log_target=True,
        )
        for batch_expected, batch_logits in zip(expected, logits, strict=True)
    )
    return temperature**2 * torch.cat([batch_terms.flatten(1).sum(1) for batch_terms in terms])


@dataclass(frozen=True, eq=False)
class DivergenceFrom:
    """Measures how far networks are from the `expected` logits, each time on the same images."""

    expected: Sequence[Logits]
    batches: Callable[[], Iterable[Batch]]
    """Returns the images; in several processes, this one's shard of them."""
    task: Task = SINGLE_LABEL

    def __call__(self, network: nn.Module) -> Float[Tensor, "image"]:
        """Return the divergence of each image; see `divergence_by_image`."""
        return divergence_by_image(self.expected, logits_of(network, self.batches(), self.task))


def relative_error(
    actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> float:
    """Return the largest absolute difference over the largest absolute expected value.

    For several tensors it is the largest of their errors.
    """
    if not isinstance(actual, Tensor):
        return max(map(relative_error, actual, expected))
    assert isinstance(expected, Tensor)
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def output_error(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], task: Task | None = None
) -> float:
    """Return the error of a network's outputs, a mean over images.

    It is the divergence of softened logits, as `task` reads them. Without a task it is summed over
    the outputs: the divergence where an output has one row of logits for each image, or else the
    squared difference over the variance.
    """
    if task is not None:
        logits, actual = (task.read(tensor, len(tensor)) for (tensor,) in (expected, outputs))
        return float(divergence_by_image([logits], [actual], TEMPERATURE).mean())
    total = 0.0
    for wanted, output in zip(expected, outputs, strict=True):
        if wanted.dim() == 2 and wanted.shape[1] > 1:
            total += float(divergence_by_image([wanted], [output], TEMPERATURE).mean())
        else:
            error = (output - wanted).double().square().mean()
            total += float(error / wanted.double().var().clamp_min(1e-30))
    return total


def error_ratio(errors: Float[Tensor, "measurement 2"]) -> float:
    """Return output error over input error, the geometric mean of those `errors` above rounding.

    It is 0 where no error is.
    """
    ratios = [
        output / source for output, source in errors.tolist() if output > ROUNDING and source > 0
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 0.0
