"""How far a network's answers are from another one's, on images without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data import Batch
from secateur.errors import DataError
from secateur.runtime import distributed
from secateur.runtime.module_state import device_of, evaluating

CONFIDENCE_SIGMAS = 2.0
"""By so many standard errors a mean must fall to have fallen."""
Logits = Float[Tensor, "_ class"]
"""Logits `[image, class]`; batches may have different numbers of images."""


@dataclass(frozen=True)
class OutputDivergence:
    """How near a network is to what was expected of it."""

    divergence: float
    """Mean KL divergence of its answers from the expected ones, KL(expected ‖ given), in nats;
    softened answers multiply it by the square of their temperature."""
    top1_fraction: float
    """Share of the images of which both predict the same class."""


def logits_of(network: nn.Module, batches: Iterable[Batch]) -> tuple[Logits, ...]:
    """The network's logits in evaluation mode, a tensor for each batch.

    Of several processes each brings its share of the batches (`distributed.dealt`), and all get the
    answers to all of them.
    """
    device = device_of(network)
    with evaluating(network), torch.inference_mode():
        own = [network(batch.images.to(device)).cpu() for batch in batches]
    return tuple(distributed.gather_shards(own))


def divergence_from(
    expected: Sequence[Logits],
    network: nn.Module,
    batches: Iterable[Batch],
    temperature: float = 1.0,
) -> OutputDivergence:
    """How near `network`, in evaluation mode, is to the `expected` answers to the same batches.

    Both answers are softened by the temperature T, and the divergence multiplied by T², as in
    distillation (Hinton et al., 2015). Raises `DataError` where there are no images.
    """
    given = logits_of(network, batches)
    divergences = divergence_by_image(expected, given, temperature)
    pairs = zip(expected, given, strict=True)
    equal = sum(int((found.argmax(1) == wanted.argmax(1)).sum()) for wanted, found in pairs)
    return OutputDivergence(float(divergences.mean()), equal / len(divergences))


def divergence_by_image(
    expected: Sequence[Logits], logits: Sequence[Logits], temperature: float = 1.0
) -> Float[Tensor, "image"]:
    """KL(expected ‖ given) of each image, softened as `agreement_of` has it.

    In float64: near agreement is a small difference of large terms. Raises `DataError` where there
    are no images.
    """
    if not sum(map(len, expected)):
        raise DataError("there are no images to compare answers on")
    softened = (
        F.kl_div(
            F.log_softmax(found.double() / temperature, dim=1),
            F.log_softmax(wanted.double() / temperature, dim=1),
            reduction="none",
            log_target=True,
        )
        for wanted, found in zip(expected, logits, strict=True)
    )
    return temperature**2 * torch.cat([each.sum(1) for each in softened])


def is_smaller(before: Float[Tensor, "image"], after: Float[Tensor, "image"]) -> bool:
    """Whether the mean has, by more than chance explains, image by image; one image can't tell."""
    fall = before - after
    standard_error = float(fall.std()) / math.sqrt(len(fall)) if len(fall) > 1 else math.inf
    return float(fall.mean()) > CONFIDENCE_SIGMAS * standard_error


def relative_error(
    actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> float:
    """Largest absolute difference over the largest absolute expected value.

    Of several tensors the worst.
    """
    if not isinstance(actual, Tensor):
        return max(map(relative_error, actual, expected))
    assert isinstance(expected, Tensor)
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
