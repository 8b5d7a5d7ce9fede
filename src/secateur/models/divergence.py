"""Divergence: how far a network's outputs are from another's, on images without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data import Batch
from secateur.models.score import OutputDivergence
from secateur.runtime import distributed
from secateur.runtime.errors import DataError
from secateur.runtime.module_state import device_of, evaluating

CONFIDENCE_SIGMAS = 2.0
"""The standard errors by which a mean must fall for the fall to be significant."""
Logits = Float[Tensor, "_ class"]
"""Logits `[image, class]`; batches may have different numbers of images."""


def logits_of(network: nn.Module, batches: Iterable[Batch]) -> tuple[Logits, ...]:
    """Return the network's logits in evaluation mode, a tensor for each batch.

    Each process passes its shard of the batches (`distributed.shard`) and gets the logits of
    all batches.
    """
    device = device_of(network)
    with evaluating(network), torch.inference_mode():
        local_logits = [network(batch.images.to(device)).cpu() for batch in batches]
    return tuple(distributed.gather_shards(local_logits))


def divergence_from(
    expected: Sequence[Logits],
    network: nn.Module,
    batches: Iterable[Batch],
    temperature: float = 1.0,
) -> OutputDivergence:
    """Return the divergence of `network`, in evaluation mode, from the `expected` logits.

    `expected` are those of the same batches. Both logits are softened by the temperature T, and the
    divergence is multiplied by T², as in distillation (Hinton et al., 2015). Raises `DataError`
    if there are no images.
    """
    actual = logits_of(network, batches)
    divergences = divergence_by_image(expected, actual, temperature)
    pairs = zip(expected, actual, strict=True)
    equal = sum(int((mine.argmax(1) == reference.argmax(1)).sum()) for reference, mine in pairs)
    return OutputDivergence(float(divergences.mean()), equal / len(divergences))


def divergence_by_image(
    expected: Sequence[Logits], logits: Sequence[Logits], temperature: float = 1.0
) -> Float[Tensor, "image"]:
    """Return KL(expected ‖ logits) of each image, softened as in `divergence_from`.

    It is computed in float64: a small divergence is a small difference of large terms. Raises
    `DataError` if there are no images.
    """
    if not sum(map(len, expected)):
        raise DataError("there are no images to compare outputs on")
    terms = (
        F.kl_div(
            F.log_softmax(batch_logits.double() / temperature, dim=1),
            F.log_softmax(batch_expected.double() / temperature, dim=1),
            reduction="none",
            log_target=True,
        )
        for batch_expected, batch_logits in zip(expected, logits, strict=True)
    )
    return temperature**2 * torch.cat([batch_terms.sum(1) for batch_terms in terms])


def is_smaller(before: Float[Tensor, "image"], after: Float[Tensor, "image"]) -> bool:
    """Return whether the mean over images fell significantly; never true for a single image."""
    fall = before - after
    standard_error = float(fall.std()) / math.sqrt(len(fall)) if len(fall) > 1 else math.inf
    return float(fall.mean()) > CONFIDENCE_SIGMAS * standard_error


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
