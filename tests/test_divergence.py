"""Divergence of two networks, image by image, against a slow reference."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from networks import Chain, random_images, randomise_norms
from secateur.data import Batch
from secateur.models.divergence import divergence_from, outputs_of
from secateur.runtime.errors import DataError


def in_batches(images: Tensor, size: int) -> list[Batch]:
    parts = torch.arange(len(images)).split(size)
    return [Batch(images[part], torch.zeros(len(part)).long(), part) for part in parts]


def two_networks(generator: torch.Generator) -> tuple[Chain, Chain]:
    one, other = Chain().eval(), Chain().eval()
    for network in (one, other):
        randomise_norms(network, generator)
    return one, other


def by_hand(expected: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean divergence and share of equal predictions, image by image."""
    divergence, equal = 0.0, 0
    for wanted, row in zip(expected.double().tolist(), other.double().tolist(), strict=True):
        p, q = (
            [math.exp(v) / sum(map(math.exp, logits)) for v in logits] for logits in (wanted, row)
        )
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        equal += max(range(len(p)), key=p.__getitem__) == max(range(len(q)), key=q.__getitem__)
    return divergence / len(expected), equal / len(expected)


@pytest.mark.parametrize("size", [1, 4, 11])
def test_divergence_and_predictions_are_those_of_each_image(
    size: int, generator: torch.Generator
) -> None:
    one, other = two_networks(generator)
    images = random_images(11)
    batches = in_batches(images, size)
    result = divergence_from(outputs_of(one, batches), other, batches)
    with torch.inference_mode():
        divergence, top1 = by_hand(one(images), other(images))
    assert result.divergence == pytest.approx(divergence, rel=1e-5)
    assert result.agreement_fraction == pytest.approx(top1)


def test_softening_divides_the_logits(generator: torch.Generator) -> None:
    one, other = two_networks(generator)
    batches = in_batches(random_images(7), 3)
    result = divergence_from(outputs_of(one, batches), other, batches, temperature=3.0)
    with torch.inference_mode():
        images = torch.cat([batch.images for batch in batches])
        divergence, top1 = by_hand(one(images) / 3, other(images) / 3)
    assert result.divergence == pytest.approx(9 * divergence, rel=1e-5)
    assert result.agreement_fraction == pytest.approx(top1)


def test_a_network_agrees_with_itself(generator: torch.Generator) -> None:
    one, _ = two_networks(generator)
    batches = in_batches(random_images(7), 3)
    result = divergence_from(outputs_of(one, batches), copy.deepcopy(one), batches)
    assert result.divergence == pytest.approx(0, abs=1e-9)
    assert result.agreement_fraction == 1.0


def test_labels_are_ignored(generator: torch.Generator) -> None:
    one, other = two_networks(generator)
    batches = in_batches(random_images(7), 3)
    strange = [replace(batch, labels=batch.labels - 9) for batch in batches]
    result = divergence_from(outputs_of(one, batches), other, batches)
    assert divergence_from(outputs_of(one, strange), other, strange) == result


def test_networks_are_compared_in_evaluation_mode_and_left_as_they_were(
    generator: torch.Generator,
) -> None:
    one, other = two_networks(generator)
    batches = in_batches(random_images(8), 4)
    expected = divergence_from(outputs_of(one, batches), other, batches)
    before = copy.deepcopy(other.state_dict())
    one.train()
    other.train()
    assert divergence_from(outputs_of(one, batches), other, batches) == expected
    assert other.training
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images to compare"):
        divergence_from((), Chain(), [])
