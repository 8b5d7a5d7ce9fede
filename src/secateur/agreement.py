"""How far a network's answers are from another one's, on images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.data import Batch
from secateur.errors import DataError
from secateur.graph import evaluating

Answers = Float[Tensor, "_ class"]
"""Logits `[image, class]`; batches may have different numbers of images."""


@dataclass(frozen=True)
class Agreement:
    """How near a network is to what was expected of it."""

    divergence: float
    """Mean KL divergence of its answers from the expected ones, KL(expected ‖ given), in nats;
    softened answers multiply it by the square of their temperature."""
    top1_fraction: float
    """Share of the images of which both predict the same class."""


def answers_of(network: nn.Module, batches: Iterable[Batch]) -> tuple[Answers, ...]:
    """The network's logits in evaluation mode, a tensor for each batch."""
    with evaluating(network), torch.inference_mode():
        return tuple(network(batch.images) for batch in batches)


def agreement_of(
    expected: Sequence[Answers],
    network: nn.Module,
    batches: Iterable[Batch],
    temperature: float = 1.0,
) -> Agreement:
    """How near `network`, in evaluation mode, is to the `expected` answers to the same batches.

    Both answers are softened by the temperature T, and the divergence multiplied by T², as in
    distillation (Hinton et al., 2015). Raises `DataError` where there are no images.
    """
    divergence = torch.zeros((), dtype=torch.float64)
    equal, count = 0, 0
    with evaluating(network), torch.inference_mode():
        for wanted, batch in zip(expected, batches, strict=True):
            given = network(batch.images)
            divergence += divergence_of(wanted, given, temperature)
            equal += int((given.argmax(1) == wanted.argmax(1)).sum())
            count += len(given)
    if not count:
        raise DataError("there are no images to compare answers on")
    return Agreement(temperature**2 * float(divergence) / count, equal / count)


def divergence_of(
    wanted: Float[Tensor, "image class"],
    given: Float[Tensor, "image class"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(wanted ‖ given) of softmaxes of logits, softened by the temperature, summed over images.

    In float64: near agreement is a small difference of large terms.
    """
    return F.kl_div(
        F.log_softmax(given.double() / temperature, dim=1),
        F.log_softmax(wanted.double() / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
