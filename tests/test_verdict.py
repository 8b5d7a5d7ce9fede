"""The verdict: one sentence on what a run has cost and gained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from runs import DigitsRun
from secateur.data import Batch
from secateur.models.evaluate import evaluate, evaluate_and_predict
from secateur.models.task import SINGLE_LABEL, Task
from secateur.pipeline.result import RunResult
from secateur.pipeline.verdict import verdict


def with_scores(result: RunResult, **after: Any) -> RunResult:
    """The result with two stages, the original's and one that differs from it as told."""
    first = result.stages[0]
    score = replace(first.score, **after)
    stages = (first, result.stages[-1].model_copy(update={"score": score}))
    return result.model_copy(update={"stages": stages, "has_labels": True, "task": SINGLE_LABEL})


def test_half_the_network_without_a_significant_loss(digits_run: DigitsRun) -> None:
    first = digits_run.result.stages[0].score
    result = with_scores(
        digits_run.result,
        macs=first.macs // 2,
        parameters=first.parameters // 4,
        latency_ms=first.latency_ms / 1.2,
        metric=first.metric - 0.01,
        agreement_fraction=0.98,
        lost=5,
        gained=2,
    )
    before = 100 * first.metric
    assert verdict(result) == (
        "MACs −50 %, parameters −75 %; 1.2× faster on this machine; "
        f"top-1 {before:.1f} → {before - 1:.1f} % (not significantly different, p = 0.45); "
        f"same prediction as the original for 98.0 % of {first.images} test images"
    )


@pytest.mark.parametrize(
    ("lost", "gained", "words"),
    [
        (20, 4, "(significantly worse)"),
        (4, 20, "(significantly better)"),
        (0, 0, "(not significantly different, p = 1)"),
        (6, 0, "(significantly worse)"),  # 2 / 2^6 = 0.03
        (5, 0, "(not significantly different, p = 0.062)"),  # 2 / 2^5
    ],
)
def test_accuracies_are_compared_on_the_images_that_one_network_alone_gets_right(
    digits_run: DigitsRun, lost: int, gained: int, words: str
) -> None:
    assert words in verdict(with_scores(digits_run.result, lost=lost, gained=gained))


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.5, "; 1.5× faster on this machine"),
        (1.03, "; not faster on this machine"),
        (0.97, "; not faster on this machine"),
        (0.5, "; 2× slower on this machine"),
    ],
)
def test_faster_is_what_was_measured(digits_run: DigitsRun, ratio: float, words: str) -> None:
    latency = digits_run.result.stages[0].score.latency_ms / ratio
    assert words in verdict(with_scores(digits_run.result, latency_ms=latency))


def test_without_labels_there_is_agreement_alone(digits_run: DigitsRun) -> None:
    result = with_scores(digits_run.result, agreement_fraction=0.9, lost=3, gained=0)
    text = verdict(result.model_copy(update={"has_labels": False}))
    assert "top-1" not in text
    assert "significant" not in text
    assert "for 90.0 % of" in text


def test_labels_of_one_image_are_not_tested_as_if_independent(digits_run: DigitsRun) -> None:
    result = with_scores(digits_run.result, lost=30, gained=0)
    several = result.model_copy(update={"task": Task("multi-label")})
    assert "label accuracy" in verdict(several)
    assert "significant" not in verdict(several)


def test_lost_and_gained_images_are_counted() -> None:
    images = torch.eye(4)[:, :, None, None]
    labels = torch.tensor([0, 1, 2, 3])
    original, other = (
        torch.nn.Flatten(),
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4)),
    )
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        next(other.parameters()).copy_(torch.eye(4)[[1, 0, 2, 3]])  # mistakes 0 for 1 and 1 for 0
    batches = [Batch(images, torch.tensor([0, 0, 2, 1]), torch.arange(4))]
    _, predictions = evaluate_and_predict(original, batches, known_ms=1.0)
    score = evaluate(other, batches, original=predictions, known_ms=1.0)
    # Right: the original images 0 and 2; the other 1 and 2.
    assert (score.lost, score.gained, score.agreement_fraction) == (1, 1, 0.5)
    assert labels.tolist() == predictions.classes.tolist()
