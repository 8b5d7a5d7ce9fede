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
from secateur.pipeline.result import RunResult, Stage
from secateur.pipeline.verdict import verdict


def with_scores(result: RunResult, **after: Any) -> RunResult:
    """The result with two stages, the original's and one that differs from it as told."""
    first = result.stages[0]
    score = replace(first.score, **after)
    stages = (first, result.stages[-1].model_copy(update={"score": score}))
    return result.model_copy(update={"stages": stages, "has_labels": True, "task": SINGLE_LABEL})


def halved(result: RunResult, **after: Any) -> RunResult:
    """The result with half the MACs, a quarter of the parameters, and 1.6 times as fast."""
    first = result.stages[0].score
    changes = {
        "macs": first.macs // 2,
        "parameters": first.parameters // 4,
        "latency_ms": first.latency_ms / 1.6,
    }
    return with_scores(result, **{**changes, **after})


def at_stage(result: RunResult, stage: Stage) -> RunResult:
    """The result as if it had ended with a stage."""
    last = result.stages[-1].model_copy(update={"stage": stage})
    return result.model_copy(update={"stages": (result.stages[0], last)})


def test_a_loss_is_to_be_won_back_by_training(digits_run: DigitsRun) -> None:
    before = 100 * digits_run.result.stages[0].score.metric
    loss = {"metric": before / 100 - 0.05, "agreement_fraction": 0.94, "lost": 30, "gained": 4}
    result = at_stage(halved(digits_run.result, **loss), "refit")
    facts = f"Half the MACs, 1.6× faster in PyTorch, top-1 {before:.1f} → {before - 5:.1f} %"
    assert verdict(result) == f"{facts}; fine-tune to win it back"
    assert verdict(at_stage(result, "distilled")) == f"{facts}; fine-tune to win it back"
    trained = verdict(at_stage(result, "finetuned"))
    assert trained == f"{facts}; train longer or keep more to win back the rest"


def test_no_significant_loss_needs_no_advice(digits_run: DigitsRun) -> None:
    first = digits_run.result.stages[0].score
    result = halved(digits_run.result, metric=first.metric - 0.01, lost=5, gained=2)
    before = 100 * first.metric
    assert verdict(result) == (
        f"Half the MACs, 1.6× faster in PyTorch, top-1 {before:.1f} → {before - 1:.1f} % "
        f"(no significant difference on {first.images} test images)"
    )


@pytest.mark.parametrize(
    ("lost", "gained", "words"),
    [
        (4, 20, "(significantly better)"),
        (0, 0, "(no significant difference on"),
        (5, 0, "(no significant difference on"),  # p = 2 / 2^5
        (6, 0, ""),  # 2 / 2^6 = 0.03
    ],
)
def test_accuracies_are_compared_on_the_images_that_one_network_alone_gets_right(
    digits_run: DigitsRun, lost: int, gained: int, words: str
) -> None:
    text = verdict(halved(digits_run.result, lost=lost, gained=gained))
    assert words in text
    assert ("significant" in text) == bool(words)


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (0.5, "Half the MACs"),
        (0.25, "A quarter of the MACs"),
        (0.7, "30 % fewer MACs"),
        (0.999, "75 % fewer parameters and the same MACs"),
    ],
)
def test_sizes_have_names(digits_run: DigitsRun, left: float, words: str) -> None:
    macs = round(left * digits_run.result.stages[0].score.macs)
    assert verdict(halved(digits_run.result, macs=macs)).startswith(f"{words}, 1.6× faster")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.5, ", 1.5× faster in PyTorch, "),
        (1.03, ", no faster in PyTorch, "),
        (0.97, ", no faster in PyTorch, "),
        (0.5, ", 2× slower in PyTorch, "),
    ],
)
def test_faster_is_what_was_measured(digits_run: DigitsRun, ratio: float, words: str) -> None:
    latency = digits_run.result.stages[0].score.latency_ms / ratio
    text = verdict(halved(digits_run.result, latency_ms=latency))
    assert words in text
    assert ("; plan by time (--target latency=F)" in text) == (ratio == 0.5)


def test_another_engine_is_named(digits_run: DigitsRun) -> None:
    result = halved(digits_run.result)
    text = verdict(result, engine="onnxruntime", speed_up=0.74)
    assert ", 1.4× slower in onnxruntime, " in text
    assert text.endswith("or in whole blocks (--round-to 16)")


def test_without_a_time_it_says_how_many_parameters_are_left(digits_run: DigitsRun) -> None:
    text = verdict(halved(digits_run.result, latency_ms=0.0))
    assert text.startswith("Half the MACs and 75 % fewer parameters, top-1 ")
    assert "PyTorch" not in text


def test_nothing_removed(digits_run: DigitsRun) -> None:
    text = verdict(with_scores(digits_run.result))
    assert text.startswith("Nothing removed, top-1 ")
    assert text.endswith("; choose a smaller target (--target macs=0.5)")
    plan = digits_run.result.config.plan.model_copy(update={"max_drop": 0.1})
    config = digits_run.result.config.model_copy(update={"plan": plan})
    text = verdict(with_scores(digits_run.result.model_copy(update={"config": config})))
    assert text.endswith("; allow a larger drop (--max-drop) to remove any")


def test_a_large_loss_means_that_too_much_is_gone(digits_run: DigitsRun) -> None:
    result = at_stage(halved(digits_run.result, metric=0.1, lost=300, gained=0), "refit")
    assert verdict(result).endswith("→ 10.0 %; too much is gone: keep more, then fine-tune")
    assert verdict(at_stage(result, "finetuned")).endswith("; too much is gone: keep more")


def test_without_labels_there_is_agreement_alone(digits_run: DigitsRun) -> None:
    result = at_stage(halved(digits_run.result, agreement_fraction=0.9, lost=3, gained=0), "refit")
    images = result.stages[0].score.images
    unlabelled = result.model_copy(update={"has_labels": False, "task": Task(has_labels=False)})
    assert verdict(unlabelled) == (
        "Half the MACs, 1.6× faster in PyTorch, the same prediction as the original for "
        f"90.0 % of {images} test images; distill (--distill N) or keep more"
    )
    assert verdict(at_stage(unlabelled, "distilled")).endswith("; keep more")


@pytest.mark.parametrize(
    ("task", "metric", "words"),
    [
        (Task("detection", metric_name="AP"), (0.258, 0.21), "AP 25.8 → 21.0 %; distill"),
        (Task("segmentation", metric_name="mIoU"), (0.7, 0.699), "mIoU 70.0 → 69.9 %"),
        (Task("segmentation", metric_name="mIoU"), (0.7, 0.6), "60.0 %; fine-tune to win it back"),
        (Task("multi-label"), (0.9, 0.9), "label accuracy 90.0 → 90.0 %"),
        (Task("regression", metric_name="PSNR", metric_unit="dB"), (32.0, 31.0), "32.0 → 31.0 dB;"),
    ],
)
def test_other_metrics_are_not_tested_by_image(
    digits_run: DigitsRun, task: Task, metric: tuple[float, float], words: str
) -> None:
    result = at_stage(halved(digits_run.result, metric=metric[1], lost=30, gained=0), "refit")
    first = result.stages[0]
    first = first.model_copy(update={"score": replace(first.score, metric=metric[0])})
    result = result.model_copy(update={"task": task, "stages": (first, result.stages[1])})
    assert words in verdict(result)
    assert "significant" not in verdict(result)


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
