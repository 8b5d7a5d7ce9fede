"""What a run found, drawn: trade-off, filters kept, votes, and what the filters see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from secateur.experiments.compare.statistics import BenchmarkStatistics
from secateur.experiments.report import concept_map, strip
from secateur.experiments.report.charts import draw_methods
from secateur.experiments.report.drawing import (
    COLOURS,
    STYLE,
    Chart,
    draw_heat,
    file_name,
    make_figure,
    short,
)
from secateur.experiments.report.gallery import Gallery
from secateur.pipeline.result import RunResult

KEPT, REMOVED, RUN = COLOURS[2], COLOURS[1], "#000000"
STRIP = 256
"""Columns that the votes of a layer are drawn in."""
MOST_LAYERS = 80


def run_charts(
    result: RunResult, gallery: Gallery | None = None, beside: BenchmarkStatistics | None = None
) -> tuple[Chart, ...]:
    """All that there is something to draw of."""
    drawn = [tradeoff(result, beside), kept_filters(result), votes(result, gallery)]
    if gallery is not None and concept_map(gallery).concepts:
        drawn.append(concepts(result, gallery))
    return tuple(drawn)


@rc_context(STYLE)
def tradeoff(result: RunResult, beside: BenchmarkStatistics | None = None) -> Chart:
    """Top-1 against MACs: the steps of the run, sizes that were tried, ways of a comparison."""
    name = result.config.model.name
    figure, (axes,) = make_figure(1)
    before = result.stages[0].score
    if beside is not None:
        settings = [setting for setting in beside.settings if setting[0] == name]
        draw_methods(axes, beside, settings, "macs_left")
    _trials(axes, result)
    left = [stage.score.macs / before.macs for stage in result.stages]
    accuracy = [100 * stage.score.top1_fraction for stage in result.stages]
    axes.plot(left, accuracy, color=RUN, ls=":", marker="*", ms=9, label="this run")
    _name_steps(axes, [stage.stage for stage in result.stages], left, accuracy)
    axes.axhline(accuracy[0], color="#555555", ls="--", lw=1)
    axes.set_xlabel("share of MACs left")
    axes.set_ylabel("top-1 in %")
    axes.margins(x=0.15)
    axes.legend()
    title = f"{short(name)}: accuracy against MACs left"
    figure.suptitle(title)
    return Chart(file_name(short(name), "tradeoff"), title, figure)


def _name_steps(
    axes: Axes, names: Sequence[str], left: Sequence[float], accuracy: Sequence[float]
) -> None:
    """Names beside points, the last first; none where it would lie upon another."""
    reach = max(accuracy) - min(accuracy)
    named: list[tuple[float, float]] = []
    for name, x, y in reversed(list(zip(names, left, accuracy, strict=True))):
        if all(abs(x - u) > 0.1 or abs(y - v) > 0.08 * reach for u, v in named):
            axes.annotate(name, (x, y), (6, -12), textcoords="offset points")
            named.append((x, y))


def _trials(axes: Axes, result: RunResult) -> None:
    """Sizes that were tried for `max_drop`, where those are fractions of MACs."""
    if result.size_trials and result.config.plan.target.startswith("macs"):
        points = sorted(
            (t.fraction_left, 100 * t.validation_top1_fraction) for t in result.size_trials
        )
        label = "sizes tried (validation images)"
        axes.plot(*zip(*points, strict=True), color="#888888", marker=".", label=label)


@rc_context(STYLE)
def kept_filters(result: RunResult) -> Chart:
    """Filters kept and removed, a bar a layer."""
    groups = result.groups[:MOST_LAYERS]
    figure, (axes,) = make_figure(1, rows=len(groups))
    places = range(len(groups))
    removed = [len(group.removed) for group in groups]
    kept = [group.filters - gone for group, gone in zip(groups, removed, strict=True)]
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
def votes(result: RunResult, gallery: Gallery | None = None) -> Chart:
    """A strip a layer: its filters by score, the best first, with their votes or scores."""
    groups = result.groups[:MOST_LAYERS]
    seen = {layer.name: layer for layer in gallery.layers} if gallery else {}
    figure, (axes,) = make_figure(1, rows=len(groups))
    strips = np.zeros((len(groups), STRIP))
    for row, group in enumerate(groups):
        heights = np.array([height for _, height in strip(group, seen.get(group.name))])
        strips[row] = heights[np.arange(STRIP) * len(heights) // STRIP]
        share = 1 - len(group.removed) / group.filters
        axes.plot([share, share], [row - 0.5, row + 0.5], color=REMOVED, lw=2)
    edges = (0, 1, len(groups) - 0.5, -0.5)
    drawn = axes.imshow(strips, aspect="auto", extent=edges, cmap="viridis", vmin=0, vmax=1)
    words = "votes" if gallery else "score"
    figure.colorbar(drawn, label=f"{words} over the layer's highest")
    axes.set_yticks(range(len(groups)), [short(group.name) for group in groups], fontsize="x-small")
    axes.grid(visible=False)
    axes.set_xlabel("share of the layer's filters, best first; right of the mark they go")
    title = f"{short(result.config.model.name)}: filters by {short(result.config.score.criterion)}"
    figure.suptitle(title)
    return Chart(file_name(short(result.config.model.name), "votes"), title, figure)


@rc_context(STYLE)
def concepts(result: RunResult, gallery: Gallery) -> Chart:
    """Detectors by concept and layer, before and after the cut."""
    found = concept_map(gallery)
    figure, panels = make_figure(2, rows=max(len(found.concepts), 12))
    for axes, table, title in zip(
        panels, (found.before, found.after), ("before", "after"), strict=True
    ):
        counts = np.array(table, dtype=float).reshape(len(found.concepts), len(found.layers))
        counts[counts == 0] = np.nan
        draw_heat(axes, found.concepts, found.layers, counts, 0.0, float(found.most), ".0f")
        axes.set_title(title)
        axes.tick_params(axis="x", labelsize="xx-small")
    title = f"{short(result.config.model.name)}: detectors by concept and layer"
    figure.suptitle(title)
    return Chart(file_name(short(result.config.model.name), "concepts"), title, figure)
