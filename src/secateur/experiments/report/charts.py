"""What a comparison found, drawn: trade-off, steps, spared layers, agreement of criteria."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats
from matplotlib import rc_context
from matplotlib.axes import Axes

from secateur.experiments.compare.results import STAGES
from secateur.experiments.compare.runner import JobResult
from secateur.experiments.compare.spec import method_name
from secateur.experiments.compare.statistics import BenchmarkStatistics, Setting
from secateur.experiments.report.drawing import (
    STYLE,
    Chart,
    draw_heat,
    file_name,
    look_of,
    make_figure,
    short,
)
from secateur.pipeline.result import RunResult

Results = dict[tuple[str, Setting], dict[int, RunResult]]
"""Of each way in each setting: whole results by seed."""

SIZES = {"macs_left": "MACs", "parameters_left": "parameters", "latency_left": "latency"}
"""What accuracy is drawn against, as a field of a row and in words."""


@rc_context(STYLE)
def charts(found: BenchmarkStatistics, cells: Sequence[JobResult] = ()) -> tuple[Chart, ...]:
    """All that there is something to draw of; a chart is about one network.

    Those about layers are of the whole results in `cells`.
    """
    results: Results = {}
    for cell in cells:
        if cell.result is not None:
            key = (method_name(cell.criterion, cell.variant), (cell.network, cell.target))
            results.setdefault(key, {})[cell.seed] = cell.result
    drawn = []
    for network in dict.fromkeys(network for network, _ in found.settings):
        settings = [setting for setting in found.settings if setting[0] == network]
        if not any((way, setting) in found.rows for way in found.methods for setting in settings):
            continue
        for size, words in SIZES.items():
            drawn.append(_tradeoff(found, network, settings, size, words))
        drawn.append(_steps(found, network, settings))
        with_layers = [
            setting
            for setting in settings
            if any((way, setting) in results for way in found.methods)
        ]
        if with_layers:
            drawn.append(_spared(found, results, network, with_layers))
            drawn += _agreement(found, results, network, with_layers)
    return tuple(drawn)


def _tradeoff(
    found: BenchmarkStatistics, network: str, settings: Sequence[Setting], size: str, words: str
) -> Chart:
    """Accuracy against what is left, a line a way, with a band of one standard deviation."""
    figure, (axes,) = make_figure(1)
    draw_methods(axes, found, settings, size)
    before = [
        value
        for way in found.methods
        for setting in settings
        for value in found.values(way, setting, "before").values()
    ]
    axes.axhline(statistics.mean(before), color="#555555", ls="--", label="before the cut")
    axes.set_xlabel(f"share of {words} left")
    axes.set_ylabel("top-1 in %")
    axes.legend()
    title = f"{network}: accuracy against {words} left"
    figure.suptitle(title)
    return Chart(file_name(network, "against", words), title, figure)


def draw_methods(
    axes: Axes, found: BenchmarkStatistics, settings: Sequence[Setting], size: str
) -> None:
    """A line a way through its settings: top-1 in % against the field `size` of their rows."""
    for number, way in enumerate(found.methods):
        points = []
        for setting in settings:
            rows = found.rows.get((way, setting), {}).values()
            left = [share for row in rows if (share := getattr(row, size)) is not None]
            if left:
                accuracies = list(found.values(way, setting).values())
                points.append((statistics.mean(left), *_mean_and_deviation(accuracies)))
        if not points:
            continue
        left_, mean, deviation = np.array(sorted(points)).T
        colour, marker = look_of(number)
        axes.plot(left_, mean, color=colour, marker=marker, label=short(way))
        axes.fill_between(left_, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)


def _steps(found: BenchmarkStatistics, network: str, settings: Sequence[Setting]) -> Chart:
    """Accuracy after every step, a panel a target."""
    steps = [
        step
        for step in STAGES
        if any(found.values(way, setting, step) for way in found.methods for setting in settings)
    ]
    figure, panels = make_figure(len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        for number, way in enumerate(found.methods):
            pairs = [
                (place, *_mean_and_deviation(list(values.values())))
                for place, step in enumerate(steps)
                if (values := found.values(way, setting, step))
            ]
            if pairs:
                place, mean, deviation = np.array(pairs).T
                colour, marker = look_of(number)
                axes.errorbar(
                    place,
                    mean,
                    deviation,
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=short(way),
                )
        axes.set_xticks(range(len(steps)), steps)
        axes.set_title(setting[1])
        axes.set_ylabel("top-1 in %")
    named = [axes for axes in panels if axes.get_legend_handles_labels()[0]]
    if named:
        named[0].legend()
    title = f"{network}: accuracy step by step"
    figure.suptitle(title)
    return Chart(file_name(network, "steps"), title, figure)


def _spared(
    found: BenchmarkStatistics, results: Results, network: str, settings: Sequence[Setting]
) -> Chart:
    """The share of each layer's filters that stays, a panel a target."""

    def kept(result: RunResult) -> dict[str, float]:
        return {group.name: 1 - len(group.removed) / group.filters for group in result.groups}

    figure, panels = make_figure(len(settings), rows=_layers(results, settings))
    for axes, setting in zip(panels, settings, strict=True):
        draw_heat(axes, *_by_layer(found.methods, results, setting, kept), low=0.0)
        axes.set_title(setting[1])
    title = f"{network}: share of filters kept by layer"
    figure.suptitle(title)
    return Chart(file_name(network, "spared"), title, figure)


def _agreement(
    found: BenchmarkStatistics, results: Results, network: str, settings: Sequence[Setting]
) -> list[Chart]:
    """Spearman's rank correlation of each criterion's scores with the baseline's, by layer."""
    setting = next((each for each in settings if (found.baseline, each) in results), None)
    if setting is None or len(found.methods) < 2:
        return []
    base = results[found.baseline, setting]

    def agreement(result: RunResult) -> dict[str, float]:
        other = base.get(result.config.seed)
        if other is None:
            return {}
        scores = {group.name: group.scores for group in other.groups}
        return {
            group.name: _spearman(group.scores, scores[group.name])
            for group in result.groups
            if group.name in scores
        }

    figure, (axes,) = make_figure(1, rows=_layers(results, [setting]))
    draw_heat(axes, *_by_layer(found.methods, results, setting, agreement), low=-1.0)
    title = f"{network}: rank correlation of filter scores with {found.baseline}'s by layer"
    figure.suptitle(title, fontsize="medium")
    return [Chart(file_name(network, "agreement"), title, figure)]


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Not a number where one of them gives all filters the same score."""
    if min(len(set(one)), len(set(other))) < 2:
        return float("nan")
    return float(scipy.stats.spearmanr(one, other).statistic)


def _by_layer(
    all_ways: Sequence[str],
    results: Results,
    setting: Setting,
    value: Callable[[RunResult], dict[str, float]],
) -> tuple[list[str], list[str], npt.NDArray[np.float64]]:
    """Layers, ways, and the mean over seeds of a value of each layer's, `[layer, way]`."""
    ways = [way for way in all_ways if (way, setting) in results]
    columns = [[value(result) for result in results[way, setting].values()] for way in ways]
    layers = list(dict.fromkeys(name for column in columns for row in column for name in row))
    table = np.array(
        [
            [_mean(row[layer] for row in column if layer in row) for column in columns]
            for layer in layers
        ]
    )
    return layers, ways, table


def _layers(results: Results, settings: Sequence[Setting]) -> int:
    """The most groups that a network has."""
    return max(
        len(result.groups)
        for (_, setting), by_seed in results.items()
        if setting in settings
        for result in by_seed.values()
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _mean(values: Iterable[float]) -> float:
    """Of those that are numbers; not a number where there are none."""
    some = [value for value in values if not np.isnan(value)]
    return statistics.mean(some) if some else float("nan")
