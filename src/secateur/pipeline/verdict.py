"""The outcome of a run in one sentence: what it gained, what it cost, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from scipy.stats import binomtest

from secateur.config import ENGINE_TITLES, EngineName
from secateur.models.score import Score, metric_text
from secateur.pipeline.result import RunResult
from secateur.runtime.schema import VersionedRecord


class EngineTime(VersionedRecord):
    """Median times of a forward pass of both networks in an engine, measured interleaved."""

    engine: EngineName
    version: str
    form: Literal["float32", "int8"]
    batch: int
    pruned_ms: float
    original_ms: float | None
    """None if the original network was not at hand."""
    threads: int
    processor: str

    @property
    def kind(self) -> tuple[str | int, ...]:
        """What tells it from other times: of equal ones the latest counts."""
        return self.engine, self.version, self.form, self.batch, self.threads, self.processor


LEVEL = 0.05
"""Probability below which a difference counts as significant."""
SAME_LATENCY = 0.05
"""Relative difference in time that counts as none: what two measurements may differ by."""
SAME_METRIC = 0.005
"""Loss of a metric, relative to its value before, that counts as none where it can't be tested."""
LARGE_LOSS = 0.25
"""Loss of a metric, relative to its value before, from which on less should be removed."""
LOW_AGREEMENT = 0.95
"""Agreement with the original network below which a network without labels should come closer."""
PARTS = {
    0.25: "A quarter of",
    0.33: "A third of",
    0.5: "Half",
    0.67: "Two thirds of",
    0.75: "Three quarters of",
}
"""What remaining fractions are called, where they are within one point."""


def verdict(result: RunResult, *, engine: str | None = None, speed_up: float | None = None) -> str:
    """Return what a run has gained and cost, and what to do next, as a sentence without its stop.

    Accuracy is compared by McNemar's exact test on the test images: of those that one network alone
    gets right, each is as likely to get one more, if they are equally good. Where images are not
    the unit of the metric, losses below `SAME_METRIC` count as none.

    Args:
        result: The result of the run.
        engine: Name of what ran the two networks when they were timed; None: that of the run.
        speed_up: Time of the original over that of the pruned network in `engine`; None takes the
            times of the run.

    Source: McNemar, Psychometrika 12, 1947.
    """
    before, after = result.stages[0].score, result.stages[-1].score
    if speed_up is None and min(before.latency_ms, after.latency_ms) > 0:
        speed_up = before.latency_ms / after.latency_ms
    is_smaller = after.macs < before.macs or after.parameters < before.parameters
    facts = [_size(before, after, is_timed=speed_up is not None)]
    if is_smaller and speed_up is not None:
        facts.append(f"{_speed(speed_up)} in {engine or ENGINE_TITLES[result.config.plan.engine]}")
    facts.append(_accuracy(result))
    advice = _advice(result, speed_up) if is_smaller else _advice_on_target(result)
    return f"{', '.join(facts)}; {advice}" if advice else ", ".join(facts)


def slower_notices(times: Iterable[EngineTime]) -> tuple[str, ...]:
    """Return what to do where the pruned network takes longer than the original, by engine.

    Differences of `SAME_LATENCY` don't count.
    """
    slower: dict[tuple[EngineName, str], list[str]] = {}
    for time in times:
        original_ms, pruned_ms = time.original_ms, time.pruned_ms
        if original_ms is not None and _is_slower(original_ms / pruned_ms):
            images = "1 image" if time.batch == 1 else f"{time.batch} images"
            figures = f"{images}: {original_ms:.2f} → {pruned_ms:.2f} ms"
            slower.setdefault((time.engine, time.form), []).append(figures)
    return tuple(
        f"In {ENGINE_TITLES[engine]}{' in int8' if form == 'int8' else ''} the pruned network is "
        f"slower than the original ({'; '.join(figures)}). Deploy the original there, or prune in "
        f"whole blocks of channels, --round-to 16, or by time, --target latency=F{_option(engine)}."
        for (engine, form), figures in slower.items()
    )


def _option(engine: EngineName) -> str:
    return "" if engine == "pytorch" else f" --engine {engine}"


def _size(before: Score, after: Score, *, is_timed: bool) -> str:
    """Return the remaining MACs; also the parameters if they say more, or there is no time."""
    macs = after.macs / before.macs if before.macs else 1.0
    parameters = after.parameters / before.parameters if before.parameters else 1.0
    if macs == parameters == 1:
        return "Nothing removed"
    if round(macs, 2) == round(parameters, 2) == 1:
        return "Almost nothing removed"
    if round(macs, 2) == 1:
        return f"{_fewer(parameters)} parameters and the same MACs"
    part = next((text for part, text in PARTS.items() if abs(macs - part) < 0.01), None)
    text = f"{_fewer(macs)} MACs" if part is None else f"{part} the MACs"
    return text if is_timed else f"{text} and {_fewer(parameters)} parameters"


def _fewer(fraction: float) -> str:
    return f"{100 * abs(1 - fraction):.0f} % {'fewer' if fraction <= 1 else 'more'}"


def _speed(speed_up: float) -> str:
    if speed_up > 1 + SAME_LATENCY:
        return f"{speed_up:.2g}× faster"
    return f"{1 / speed_up:.2g}× slower" if _is_slower(speed_up) else "no faster"


def _is_slower(speed_up: float) -> bool:
    return speed_up < 1 / (1 + SAME_LATENCY)


def _accuracy(result: RunResult) -> str:
    """Return the metric before and after; without labels how far outputs are the original's."""
    before, after = result.stages[0].score, result.stages[-1].score
    if result.has_metric:
        unit = result.task.metric_unit
        old = metric_text(before.metric, unit, digits=1).removesuffix(f" {unit}")
        new = metric_text(after.metric, unit, digits=1)
        return f"{result.accuracy_name} {old} → {new}{_significance(result)}"
    fraction = after.metric if after.agreement_fraction is None else after.agreement_fraction
    if result.task.is_values:
        return f"outputs with R² {fraction:.4f} to the original's on {after.images} test images"
    what = {"segmentation": "positions in ", "multi-label": "labels of "}.get(result.task.kind, "")
    return (
        "the same prediction as the original for "
        f"{100 * fraction:.1f} % of {what}{after.images} test images"
    )


def _significance(result: RunResult) -> str:
    """Return what McNemar's test says where the numbers alone would mislead."""
    after, probability = result.stages[-1].score, _probability(result)
    if probability is None:
        return ""
    if probability >= LEVEL:
        return f" (no significant difference on {after.images} test images)"
    return " (significantly better)" if (after.gained or 0) > (after.lost or 0) else ""


def _probability(result: RunResult) -> float | None:
    """Return McNemar's p of equal accuracy; None if labels of one image are not independent."""
    task, score = result.task, result.stages[-1].score
    is_by_image = task.kind in ("single-label", "binary") and not task.metric_name
    if score.lost is None or score.gained is None or not is_by_image:
        return None
    differing = score.lost + score.gained
    return float(binomtest(score.lost, differing).pvalue) if differing else 1.0


def _advice(result: RunResult, speed_up: float | None) -> str:
    """Return what to do about a loss, and about a network that is slower than before."""
    advice = [_advice_on_accuracy(result)]
    if speed_up is not None and _is_slower(speed_up):
        plan = result.config.plan
        if plan.target.startswith("latency"):
            advice.append("time the engine that will run it (secateur export)")
        else:
            has_blocks = plan.round_to is not None and plan.round_to % 16 == 0
            blocks = "" if has_blocks else " or in whole blocks (--round-to 16)"
            advice.append(f"plan by time (--target latency=F{_option(plan.engine)}){blocks}")
    return "; ".join(text for text in advice if text)


def _advice_on_accuracy(result: RunResult) -> str:
    before, after, last = result.stages[0].score, result.stages[-1].score, result.stages[-1].stage
    if not result.has_metric:
        fraction = after.metric if after.agreement_fraction is None else after.agreement_fraction
        if fraction >= LOW_AGREEMENT:
            return ""
        return "keep more" if last == "distilled" else "distill (--distill N) or keep more"
    loss = (before.metric - after.metric) / abs(before.metric) if before.metric else 0.0
    probability = _probability(result)
    if loss <= 0 or (loss < SAME_METRIC if probability is None else probability >= LEVEL):
        return ""
    if loss >= LARGE_LOSS:
        return "too much is gone: keep more" + ("" if last == "finetuned" else ", then fine-tune")
    if last == "finetuned":
        return "train longer or keep more to win back the rest"
    if result.has_labels and result.task.has_loss:
        return "fine-tune to win it back"
    return (
        "keep more, or train it with your own loss"
        if last == "distilled"
        else "distill to win some of it back"
    )


def _advice_on_target(result: RunResult) -> str:
    if result.config.plan.max_drop is not None:
        return "allow a larger drop (--max-drop) to remove any"
    return "choose a smaller target (--target macs=0.5)"
