"""The outcome of a run in one sentence."""

from __future__ import annotations

from scipy.stats import binomtest

from secateur.models.score import Score
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
    if result.has_labels:
        accuracy = f"{100 * before.top1_fraction:.1f} → {100 * after.top1_fraction:.1f} %"
        parts.append(f"{result.task.accuracy_name} {accuracy}{_significance(after, result.task)}")
    if after.agreement_fraction is not None:
        parts.append(
            f"same prediction as the original for {100 * after.agreement_fraction:.1f} % of "
            f"{after.images} test images"
        )
    return "; ".join(parts)


def _change(before: int, after: int) -> str:
    return f"{100 * (after / before - 1):+.0f} %".replace("-", "−")


def _speed(ratio: float) -> str:
    if ratio > 1 + SAME_LATENCY:
        return f"{ratio:.2g}× faster on this machine"
    if ratio < 1 / (1 + SAME_LATENCY):
        return f"{1 / ratio:.2g}× slower on this machine"
    return "not faster on this machine"


def _significance(score: Score, task: Task) -> str:
    """Return whether the accuracy differs from the original's, if that can be told."""
    if score.lost is None or score.gained is None or task.kind == "multi-label":
        return ""  # labels of one image are not independent
    differing = score.lost + score.gained
    probability = binomtest(score.lost, differing).pvalue if differing else 1.0
    if probability >= LEVEL:
        return f" (not significantly different, p = {probability:.2g})"
    return " (significantly worse)" if score.lost > score.gained else " (significantly better)"
