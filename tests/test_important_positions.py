"""Positions that the output depends on: the random combinations whose gradients tell."""

from __future__ import annotations

import pytest
import torch

from secateur.models.task import SINGLE_LABEL
from secateur.pruning.refit.important_positions import _random_combination


def test_labels_are_drawn_from_the_networks_own_prediction() -> None:
    images, prediction = 3000, torch.tensor([0.2, 0.7, 0.1])
    logits = prediction.log().repeat(images, 1).requires_grad_()
    generators = [torch.Generator().manual_seed(number) for number in range(images)]
    total = _random_combination(logits, SINGLE_LABEL, generators)
    (gradient,) = torch.autograd.grad(total, logits)
    labels = (gradient + prediction).argmax(1)
    frequencies = labels.bincount(minlength=3) / images
    assert frequencies.tolist() == pytest.approx(prediction.tolist(), abs=0.03)
