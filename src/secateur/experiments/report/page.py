"""`report.html` of a run: one offline page with scores, layers, concepts and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from markupsafe import Markup

from secateur.config import ENGINE_TITLES
from secateur.experiments.compare.statistics import BenchmarkStatistics
from secateur.experiments.report.gallery import Gallery, to_json
from secateur.experiments.report.html import read_script, render
from secateur.experiments.report.layers import concept_map, layer_rows
from secateur.experiments.report.sensitivity_chart import make_sensitivity_chart
from secateur.experiments.report.stage_chart import make_stage_chart
from secateur.experiments.report.times import times_section
from secateur.models.score import Score, change_text, metric_text
from secateur.pipeline.result import RunResult
from secateur.pipeline.verdict import EngineTime, verdict
from secateur.pruning.outcome import BatchNormRecalibration
from secateur.runtime.atomic_io import replace_file

COMPUTED_SOURCES = ("evidence", "outputs", "saliency", "factors")
"""Concept sources whose regions depend on the network."""


def write_report(
    result: RunResult,
    path: Path,
    gallery: Gallery | None = None,
    beside: BenchmarkStatistics | None = None,
    times: Sequence[EngineTime] = (),
) -> None:
    """Write the report of a run; the file is replaced atomically.

    Args:
        result: The result of the run.
        path: The HTML file.
        gallery: What the filters respond to; None leaves it out.
        beside: A benchmark whose methods are drawn in the chart of accuracy against MACs.
        times: What was measured in engines after the run.

    Raises:
        WriteError: The file can't be written.
    """
    removed = {group.name: len(group.removed) for group in result.groups}
    recalibration = result.batchnorm_recalibration
    rows = score_rows(result)
    page = render(
        "report.html.j2",
        result=result,
        verdict=verdict(result),
        metric=partial(metric_text, unit=result.task.metric_unit),
        cards=_cards(result),
        heads=list(rows[0]),
        figures=[list(row.values()) for row in rows],
        times=times_section(times),
        stage_chart=make_stage_chart(result),
        tradeoff=_tradeoff(result, beside),
        layers=layer_rows(result, gallery),
        sensitivity=make_sensitivity_chart(result.sensitivity, removed),
        splits=result.splits,
        dropped=result.dropped,
        concept_map=None if gallery is None else concept_map(gallery),
        gallery=gallery,
        own_regions=any(name in result.concept_sources for name in COMPUTED_SOURCES),
        refit_most=_longest_bar(result),
        recalibration=None if recalibration is None else _recalibration_text(recalibration),
        config=result.config.model_dump(mode="json"),
        environment=result.environment.model_dump(),
        data=to_json(result, gallery),
        script=read_script("theme.js", "report.js"),
    )
    replace_file(path, page)


def _tradeoff(result: RunResult, beside: BenchmarkStatistics | None) -> Markup | None:
    """Return the chart of accuracy against MACs where there is more than the run to draw."""
    if beside is None and not result.size_trials:
        return None
    from secateur.experiments.report.run_charts import tradeoff  # takes a second to import

    return tradeoff(result, beside).svg()


def _longest_bar(result: RunResult) -> float:
    """Return the error that the longest bar of the refit stands for.

    Errors as cut may be many times the variance; bars longer than it are marked.
    """
    fitted = [layer for layer in result.refit if not layer.note]
    refit = max((layer.error_refit for layer in fitted), default=1.0)
    cut = max((layer.error_cut for layer in fitted), default=1.0)
    return max(refit, min(cut, 1.0)) or 1.0


def score_rows(result: RunResult) -> list[dict[str, str]]:
    """Return the scores of each stage as text, with sizes relative to the first stage.

    Without labels there is no accuracy, only agreement with the original network.
    """
    rows = []
    first, unit = result.stages[0].score, result.task.metric_unit
    for stage in result.stages:
        score = stage.score
        rows.append(
            {
                "stage": stage.stage if stage.round == 1 else f"{stage.stage} ({stage.round})",
                **(
                    {_head(result): metric_text(score.metric, unit).removesuffix(f" {unit}")}
                    if result.has_metric
                    else {}
                ),
                **_agreement(result, score),
                **(
                    {} if first.top5_fraction is None else {"top-5 %": percent(score.top5_fraction)}
                ),
                **({} if score.loss is None else {"loss": f"{score.loss:.3f}"}),
                "MACs": f"{count_text(score.macs)} {score.macs / first.macs:.0%}",
                "params": (
                    f"{count_text(score.parameters)} {score.parameters / first.parameters:.0%}"
                ),
                "latency ms": f"{score.latency_ms:.1f}",
                "seconds": "–" if stage.stage == "before" else f"{stage.seconds:.1f}",
            }
        )
    return rows


def _agreement(result: RunResult, score: Score) -> dict[str, str]:
    """Return how far outputs are those of the original network."""
    fraction = score.agreement_fraction
    if result.task.is_values:
        return {"R² to original": "–" if fraction is None else f"{fraction:.4f}"}
    return {"agree %": percent(fraction)}


def _head(result: RunResult) -> str:
    """Return the head of the column of the metric."""
    return f"{result.accuracy_name} {result.task.metric_unit}".rstrip()


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent with two digits, or a dash."""
    return "–" if fraction is None else f"{100 * fraction:.2f}"


def count_text(number: int) -> str:
    """Return a count with three digits and a unit, such as `40.6 M`."""
    value = float(number)
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"


@dataclass(frozen=True)
class Card:
    """One figure, before and after the run."""

    title: str
    before: str
    after: str
    change: str


def _cards(result: RunResult) -> list[Card]:
    first, last = result.stages[0].score, result.stages[-1].score
    unit = result.task.metric_unit
    filters = sum(group.filters for group in result.groups)
    kept = filters - sum(len(group.removed) for group in result.groups)

    def card(title: str, before: str, after: str, ratio: float) -> Card:
        return Card(title, before, after, f"{ratio - 1:+.1%}".replace("-", "−"))

    return [
        Card(
            result.accuracy_name[:1].upper() + result.accuracy_name[1:],
            metric_text(first.metric, unit),
            metric_text(last.metric, unit),
            change_text(last.metric - first.metric, unit),
        ),
        card("MACs", count_text(first.macs), count_text(last.macs), last.macs / first.macs),
        card(
            "Parameters",
            count_text(first.parameters),
            count_text(last.parameters),
            last.parameters / first.parameters,
        ),
        card(
            f"Latency in {ENGINE_TITLES[result.config.plan.engine]}",
            f"{first.latency_ms:.1f} ms",
            f"{last.latency_ms:.1f} ms",
            last.latency_ms / first.latency_ms,
        ),
        card("Prunable filters", str(filters), str(kept), kept / max(1, filters)),
    ]


def _recalibration_text(recalibration: BatchNormRecalibration) -> str:
    if not recalibration.fraction:
        return "unchanged"
    which = "means" if recalibration.statistics == "means" else "means and variances"
    return f"{which} moved {recalibration.fraction:.0%} of the way to the re-estimated ones"
