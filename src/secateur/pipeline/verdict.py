"""The outcome of a run in one sentence."""

from __future__ import annotations

from scipy.stats import binomtest

from secateur.models.score import Score, metric_text
from secateur.models.task import Task
from secateur.pipeline.result import RunResult

LEVEL = 0.05
"""Probability below which a difference counts as significant."""
SAME_LATENCY = 0.05
"""Relative difference in time that counts as none: what two measurements may differ by."""


def verdict(result: RunResult) -> str:
    """Return what a run has cost and gained, on one line.

    Accuracy is compared by McNemar's exact test on the test images: of those that one network alone
    gets right, each is as likely to get one more, if they are equally good. Latency is what
    was measured on this machine, with both networks interleaved.

    Source: McNemar, Psychometrika 12, 1947.
    """
    before, after = result.stages[0].score, result.stages[-1].score
    parts = [
        f"MACs {_change(before.macs, after.macs)}, "
        f"parameters {_change(before.parameters, after.parameters)}",
        _speed(before.latency_ms / after.latency_ms),
    ]
    if result.has_metric:
        unit = result.task.metric_unit
        old = metric_text(before.metric, unit, digits=1).removesuffix(" %")
        accuracy = f"{old} → {metric_text(after.metric, unit, digits=1)}"
        parts.append(f"{result.task.accuracy_name} {accuracy}{_significance(after, result.task)}")
    if after.agreement_fraction is not None:
        parts.append(_agreement(after.agreement_fraction, after.images, result.task))
    return "; ".join(parts)


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.0f} %".replace("-", "−")


def _speed(ratio: float) -> str:
    if ratio > 1 + SAME_LATENCY:
        return f"{ratio:.2g}× faster on this machine"
    if ratio < 1 / (1 + SAME_LATENCY):
        return f"{1 / ratio:.2g}× slower on this machine"
    return "not faster on this machine"


def _agreement(fraction: float, images: int, task: Task) -> str:
    """Return how far the outputs are those of the original."""
    if task.is_values:
        return f"outputs have R² {fraction:.4f} with the original's on {images} test images"
    what = {"segmentation": "positions in ", "multi-label": "labels of "}.get(task.kind, "")
    return (
        f"same prediction as the original for {100 * fraction:.1f} % of {what}{images} test images"
    )


def _significance(score: Score, task: Task) -> str:
    """Return whether the accuracy differs from the original's, if that can be told."""
    is_by_image = task.kind in ("single-label", "binary") and not task.metric_name
    if score.lost is None or score.gained is None or not is_by_image:
        return ""  # labels and positions of one image are not independent
    differing = score.lost + score.gained
    probability = binomtest(score.lost, differing).pvalue if differing else 1.0
    if probability >= LEVEL:
        return f" (not significantly different, p = {probability:.2g})"
    return " (significantly worse)" if score.lost > score.gained else " (significantly better)"
