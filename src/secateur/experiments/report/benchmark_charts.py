"""Charts of a benchmark: accuracy against size and by step, filters kept, rank correlation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats
from matplotlib import rc_context
from matplotlib.axes import Axes

from secateur.experiments.compare.job import JobResult, method_name
from secateur.experiments.compare.results import STAGES
from secateur.experiments.compare.statistics import BenchmarkStatistics, Setting
from secateur.experiments.report.drawing import (
    STYLE,
    Chart,
    draw_heatmap,
    file_name,
    line_style,
    make_figure,
    short,
)
from secateur.pipeline.result import RunResult

Results = dict[tuple[str, Setting], dict[int, RunResult]]
"""Results of runs by seed, for each method and setting."""

SIZES = {"macs_left": "MACs", "parameters_left": "parameters", "latency_left": "latency"}
"""Sizes that accuracy is drawn against: a field of `Row`, and its name in a chart."""


@rc_context(STYLE)
def benchmark_charts(
    stats: BenchmarkStatistics, job_results: Sequence[JobResult] = ()
) -> tuple[Chart, ...]:
    """Return the charts of a benchmark, one network a chart.

    Charts about layers are made only if there are whole results in `job_results`.
    """
    results: Results = {}
    for job in job_results:
        if job.result is not None:
            key = (method_name(job.criterion, job.variant), (job.network, job.target))
            results.setdefault(key, {})[job.seed] = job.result
    charts = []
    for network in dict.fromkeys(network for network, _ in stats.settings):
        settings = [setting for setting in stats.settings if setting[0] == network]
        if not any(
            (method, setting) in stats.rows for method in stats.methods for setting in settings
        ):
            continue
        for size, words in SIZES.items():
            charts.append(_tradeoff(stats, network, settings, size, words))
        charts.append(_steps(stats, network, settings))
        with_layers = [
            setting
            for setting in settings
            if any((method, setting) in results for method in stats.methods)
        ]
        if with_layers:
            charts.append(_kept_filters(stats, results, network, with_layers))
            charts += _rank_correlation(stats, results, network, with_layers)
    return tuple(charts)


def _tradeoff(
    stats: BenchmarkStatistics, network: str, settings: Sequence[Setting], size: str, words: str
) -> Chart:
    """Draw accuracy against size, one line a method, with a band of one standard deviation."""
    figure, (axes,) = make_figure(1)
    draw_methods(axes, stats, settings, size)
    before = [
        percent
        for method in stats.methods
        for setting in settings
        for percent in stats.values(method, setting, "before").values()
    ]
    axes.axhline(statistics.mean(before), color="#555555", ls="--", label="before pruning")
    axes.set_xlabel(f"remaining fraction of {words}")
    axes.set_ylabel("top-1 in %")
    axes.legend()
    title = f"{network}: accuracy against remaining {words}"
    figure.suptitle(title)
    return Chart(file_name(network, "against", words), title, figure)


def draw_methods(
    axes: Axes, stats: BenchmarkStatistics, settings: Sequence[Setting], size: str
) -> None:
    """Draw a line for each method: top-1 in % against the field `size` of its rows."""
    for number, method in enumerate(stats.methods):
        points = []
        for setting in settings:
            rows = stats.rows.get((method, setting), {}).values()
            sizes = [fraction for row in rows if (fraction := getattr(row, size)) is not None]
            if sizes:
                accuracies = list(stats.values(method, setting).values())
                points.append((statistics.mean(sizes), *_mean_and_deviation(accuracies)))
        if not points:
            continue
        x, mean, deviation = np.array(sorted(points)).T
        colour, marker = line_style(number)
        axes.plot(x, mean, color=colour, marker=marker, label=short(method))
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)


def _steps(stats: BenchmarkStatistics, network: str, settings: Sequence[Setting]) -> Chart:
    """Draw the accuracy after every step, one panel a target."""
    steps = [
        step
        for step in STAGES
        if any(
            stats.values(method, setting, step) for method in stats.methods for setting in settings
        )
    ]
    figure, panels = make_figure(len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        for number, method in enumerate(stats.methods):
            points = [
                (place, *_mean_and_deviation(list(values.values())))
                for place, step in enumerate(steps)
                if (values := stats.values(method, setting, step))
            ]
            if points:
                place, mean, deviation = np.array(points).T
                colour, marker = line_style(number)
                axes.errorbar(
                    place,
                    mean,
                    deviation,
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=short(method),
                )
        axes.set_xticks(range(len(steps)), steps)
        axes.set_title(setting[1])
        axes.set_ylabel("top-1 in %")
    labelled = [axes for axes in panels if axes.get_legend_handles_labels()[0]]
    if labelled:
        labelled[0].legend()
    title = f"{network}: accuracy step by step"
    figure.suptitle(title)
    return Chart(file_name(network, "steps"), title, figure)


def _kept_filters(
    stats: BenchmarkStatistics, results: Results, network: str, settings: Sequence[Setting]
) -> Chart:
    """Draw the fraction of each layer's filters that is kept, one panel a target."""

    def kept(result: RunResult) -> dict[str, float]:
        return {group.name: 1 - len(group.removed) / group.filters for group in result.groups}

    figure, panels = make_figure(len(settings), rows=_layers(results, settings))
    for axes, setting in zip(panels, settings, strict=True):
        draw_heatmap(axes, *_by_layer(stats.methods, results, setting, kept), low=0.0)
        axes.set_title(setting[1])
    title = f"{network}: fraction of filters kept by layer"
    figure.suptitle(title)
    return Chart(file_name(network, "kept"), title, figure)


def _rank_correlation(
    stats: BenchmarkStatistics, results: Results, network: str, settings: Sequence[Setting]
) -> list[Chart]:
    """Draw Spearman's rank correlation of each method's scores with the baseline's, by layer."""
    setting = next((setting for setting in settings if (stats.baseline, setting) in results), None)
    if setting is None or len(stats.methods) < 2:
        return []
    baseline = results[stats.baseline, setting]

    def correlation(result: RunResult) -> dict[str, float]:
        other = baseline.get(result.config.seed)
        if other is None:
            return {}
        scores = {group.name: group.scores for group in other.groups}
        return {
            group.name: _spearman(group.scores, scores[group.name])
            for group in result.groups
            if group.name in scores
        }

    figure, (axes,) = make_figure(1, rows=_layers(results, [setting]))
    draw_heatmap(axes, *_by_layer(stats.methods, results, setting, correlation), low=-1.0)
    title = f"{network}: rank correlation of filter scores with {stats.baseline}'s by layer"
    figure.suptitle(title, fontsize="medium")
    return [Chart(file_name(network, "rank-correlation"), title, figure)]


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the rank correlation; NaN if either gives all filters the same score."""
    if min(len(set(one)), len(set(other))) < 2:
        return float("nan")
    return float(scipy.stats.spearmanr(one, other).statistic)


def _by_layer(
    all_methods: Sequence[str],
    results: Results,
    setting: Setting,
    value: Callable[[RunResult], dict[str, float]],
) -> tuple[list[str], list[str], npt.NDArray[np.float64]]:
    """Return layers, methods, and the mean over seeds of a value, `[layer, method]`."""
    methods = [method for method in all_methods if (method, setting) in results]
    columns = [
        [value(result) for result in results[method, setting].values()] for method in methods
    ]
    layers = list(dict.fromkeys(name for column in columns for row in column for name in row))
    table = np.array(
        [
            [_mean(row[layer] for row in column if layer in row) for column in columns]
            for layer in layers
        ]
    )
    return layers, methods, table


def _layers(results: Results, settings: Sequence[Setting]) -> int:
    """Return the largest number of channel groups of a network."""
    return max(
        len(result.groups)
        for (_, setting), by_seed in results.items()
        if setting in settings
        for result in by_seed.values()
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _mean(values: Iterable[float]) -> float:
    """Return the mean without NaN; NaN if nothing remains."""
    numbers = [value for value in values if not np.isnan(value)]
    return statistics.mean(numbers) if numbers else float("nan")
