"""Charts of a run: accuracy against MACs, filters kept, scores, and detectors by concept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from secateur.experiments.compare.statistics import BenchmarkStatistics
from secateur.experiments.report.benchmark_charts import draw_methods
from secateur.experiments.report.drawing import (
    COLOURS,
    STYLE,
    Chart,
    draw_heatmap,
    file_name,
    make_figure,
    short,
)
from secateur.experiments.report.gallery import Gallery
from secateur.experiments.report.layers import concept_map, filter_heights
from secateur.experiments.report.stage_chart import is_repaired
from secateur.pipeline.result import RunResult

KEPT, REMOVED, RUN = COLOURS[2], COLOURS[1], "#000000"
STRIP_COLUMNS = 256
"""Columns of the picture of a layer's scores."""
MAX_LAYERS = 80


def run_charts(
    result: RunResult, gallery: Gallery | None = None, beside: BenchmarkStatistics | None = None
) -> tuple[Chart, ...]:
    """Return the charts of a run; that of concepts needs a gallery with detectors."""
    charts = [tradeoff(result, beside), kept_filters(result), scores(result)]
    if gallery is not None and concept_map(gallery).concepts:
        charts.append(concepts(result, gallery))
    return tuple(charts)


@rc_context(STYLE)
def tradeoff(result: RunResult, beside: BenchmarkStatistics | None = None) -> Chart:
    """Draw top-1 against MACs: steps of the run, sizes tried, and methods of a benchmark."""
    name = result.config.model.name
    figure, (axes,) = make_figure(1)
    before = result.stages[0].score
    if beside is not None:
        settings = [setting for setting in beside.settings if setting[0] == name]
        draw_methods(axes, beside, settings, "macs_left")
    _draw_size_trials(axes, result)
    shown = [stage for stage in result.stages if not is_repaired(stage, result.stages)]
    macs = [stage.score.macs / before.macs for stage in shown]
    scale = 100 if result.task.metric_unit == "%" else 1
    accuracy = [scale * stage.score.metric for stage in shown]
    axes.plot(macs, accuracy, color=RUN, ls=":", marker="*", ms=9, label="this run")
    _label_steps(axes, [stage.stage for stage in shown], macs, accuracy)
    axes.axhline(accuracy[0], color="#555555", ls="--", lw=1)
    axes.set_xlabel("remaining fraction of MACs")
    unit = result.task.metric_unit
    axes.set_ylabel(f"{result.accuracy_name} in {unit}" if unit else result.accuracy_name)
    axes.margins(x=0.15)
    axes.legend()
    title = f"{short(name)}: accuracy against remaining MACs"
    figure.suptitle(title)
    return Chart(file_name(short(name), "tradeoff"), title, figure)


def _label_steps(
    axes: Axes, names: Sequence[str], macs: Sequence[float], accuracy: Sequence[float]
) -> None:
    """Label points, the last first; labels that would overlap an earlier one are left out."""
    reach = max(accuracy) - min(accuracy)
    labelled: list[tuple[float, float]] = []
    for name, x, y in reversed(list(zip(names, macs, accuracy, strict=True))):
        if all(abs(x - u) > 0.1 or abs(y - v) > 0.08 * reach for u, v in labelled):
            axes.annotate(name, (x, y), (6, -12), textcoords="offset points")
            labelled.append((x, y))


def _draw_size_trials(axes: Axes, result: RunResult) -> None:
    """Draw the sizes that were tried for `max_drop`, if those are fractions of MACs."""
    if result.size_trials and result.config.plan.target.startswith("macs"):
        scale = 100 if result.task.metric_unit == "%" else 1
        points = sorted(
            (trial.fraction_left, scale * trial.validation_metric) for trial in result.size_trials
        )
        label = "sizes tried (validation images)"
        axes.plot(*zip(*points, strict=True), color="#888888", marker=".", label=label)


@rc_context(STYLE)
def kept_filters(result: RunResult) -> Chart:
    """Draw the numbers of filters kept and removed, one bar a layer."""
    groups = result.groups[:MAX_LAYERS]
    figure, (axes,) = make_figure(1, rows=len(groups))
    places = range(len(groups))
    removed = [len(group.removed) for group in groups]
    kept = [group.filters - len(group.removed) for group in groups]
    axes.barh(places, kept, color=KEPT, label="kept")
    axes.barh(places, removed, left=kept, color=REMOVED, hatch="//", label="removed")
    axes.set_yticks(places, [short(group.name) for group in groups], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("filters")
    axes.legend()
    title = f"{short(result.config.model.name)}: filters kept and removed by layer"
    figure.suptitle(title)
    return Chart(file_name(short(result.config.model.name), "filters"), title, figure)


@rc_context(STYLE)
def scores(result: RunResult) -> Chart:
    """Draw each layer as a strip: its filters, the best first, coloured by score."""
    groups = result.groups[:MAX_LAYERS]
    figure, (axes,) = make_figure(1, rows=len(groups))
    strips = np.zeros((len(groups), STRIP_COLUMNS))
    for row, group in enumerate(groups):
        heights = np.array([height for _, height in filter_heights(group)])
        strips[row] = heights[np.arange(STRIP_COLUMNS) * len(heights) // STRIP_COLUMNS]
        kept = 1 - len(group.removed) / group.filters
        axes.plot([kept, kept], [row - 0.5, row + 0.5], color=REMOVED, lw=2)
    edges = (0, 1, len(groups) - 0.5, -0.5)
    image = axes.imshow(strips, aspect="auto", extent=edges, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, label="score within the layer, on a scale of square roots")
    axes.set_yticks(range(len(groups)), [short(group.name) for group in groups], fontsize="x-small")
    axes.grid(visible=False)
    axes.set_xlabel("fraction of filters, best first; removed right of the mark")
    title = f"{short(result.config.model.name)}: filters by {short(result.config.score.criterion)}"
    figure.suptitle(title)
    return Chart(file_name(short(result.config.model.name), "scores"), title, figure)


@rc_context(STYLE)
def concepts(result: RunResult, gallery: Gallery) -> Chart:
    """Draw the numbers of detectors by concept and layer, before and after pruning."""
    detectors = concept_map(gallery)
    figure, panels = make_figure(2, rows=max(len(detectors.concepts), 12))
    for axes, table, title in zip(
        panels, (detectors.before, detectors.after), ("before", "after"), strict=True
    ):
        counts = np.array(table, dtype=float).reshape(
            len(detectors.concepts), len(detectors.layers)
        )
        counts[counts == 0] = np.nan
        draw_heatmap(
            axes, detectors.concepts, detectors.layers, counts, 0.0, float(detectors.most), ".0f"
        )
        axes.set_title(title)
        axes.tick_params(axis="x", labelsize="xx-small")
    title = f"{short(result.config.model.name)}: detectors by concept and layer"
    figure.suptitle(title)
    return Chart(file_name(short(result.config.model.name), "concepts"), title, figure)
