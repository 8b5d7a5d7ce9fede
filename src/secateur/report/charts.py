"""What a comparison found, drawn: trade-off, steps, spared layers, agreement of criteria."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.comparison import way_of
from secateur.result import RunResult
from secateur.rows import STAGES
from secateur.standings import Setting, Standings
from secateur.sweep import CellResult

Results = dict[tuple[str, Setting], dict[int, RunResult]]
"""Of each way in each setting: whole results by seed."""

SIZES = {"macs_left": "MACs", "parameters_left": "parameters", "latency_left": "latency"}
"""What accuracy is drawn against, as a field of a row and in words."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, which is small and can be read out and searched
    "svg.hashsalt": "secateur",  # the same drawing is the same file
    "text.parse_math": False,  # names are no formulas
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.constrained_layout.use": True,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
"""Told apart by those who don't see all colours (Okabe & Ito, 2008, "Color Universal Design")."""
MARKERS = "osD^vPX*"
DPI = 150
LONGEST_LABEL = 28


@dataclass(frozen=True, eq=False)
class Chart:
    """A drawing and what it shows, in words."""

    name: str
    """For its file."""
    title: str
    figure: Figure

    def svg(self) -> Markup:
        """The drawing for an HTML page, to be read out by its title."""
        text = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        drawing = text.getvalue()
        start = drawing.index("<svg") + len("<svg")
        label = Markup(' role="img" aria-label="{}"').format(self.title)
        return Markup(f"<svg{label}{drawing[start:]}")

    def write_png(self, folder: Path) -> Path:
        """The drawing as a PNG in a folder."""
        path = folder / f"{self.name}.png"
        with rc_context(STYLE):
            self.figure.savefig(path, dpi=DPI)
        return path


@rc_context(STYLE)
def charts(found: Standings, cells: Sequence[CellResult] = ()) -> tuple[Chart, ...]:
    """All that there is something to draw of; a chart is about one network.

    Those about layers are of the whole results in `cells`.
    """
    results: Results = {}
    for cell in cells:
        if cell.result is not None:
            key = (way_of(cell.criterion, cell.variant), (cell.network, cell.target))
            results.setdefault(key, {})[cell.seed] = cell.result
    drawn = []
    for network in dict.fromkeys(network for network, _ in found.settings):
        settings = [setting for setting in found.settings if setting[0] == network]
        if not any((way, setting) in found.rows for way in found.ways for setting in settings):
            continue
        for size, words in SIZES.items():
            drawn.append(_tradeoff(found, network, settings, size, words))
        drawn.append(_steps(found, network, settings))
        with_layers = [
            setting for setting in settings if any((way, setting) in results for way in found.ways)
        ]
        if with_layers:
            drawn.append(_spared(found, results, network, with_layers))
            drawn += _agreement(found, results, network, with_layers)
    return tuple(drawn)


def _tradeoff(
    found: Standings, network: str, settings: Sequence[Setting], size: str, words: str
) -> Chart:
    """Accuracy against what is left, a line a way, with a band of one standard deviation."""
    figure, (axes,) = _figure(1)
    for number, way in enumerate(found.ways):
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
        colour, marker = _look(number)
        axes.plot(left_, mean, color=colour, marker=marker, label=_label(way))
        axes.fill_between(left_, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
    before = [
        value
        for way in found.ways
        for setting in settings
        for value in found.values(way, setting, "before").values()
    ]
    axes.axhline(statistics.mean(before), color="#555555", ls="--", label="before the cut")
    axes.set_xlabel(f"share of {words} left")
    axes.set_ylabel("top-1 in %")
    axes.legend()
    title = f"{network}: accuracy against {words} left"
    figure.suptitle(title)
    return Chart(_file_name(network, "against", words), title, figure)


def _steps(found: Standings, network: str, settings: Sequence[Setting]) -> Chart:
    """Accuracy after every step, a panel a target."""
    steps = [
        step
        for step in STAGES
        if any(found.values(way, setting, step) for way in found.ways for setting in settings)
    ]
    figure, panels = _figure(len(settings))
    for axes, setting in zip(panels, settings, strict=True):
        for number, way in enumerate(found.ways):
            pairs = [
                (place, *_mean_and_deviation(list(values.values())))
                for place, step in enumerate(steps)
                if (values := found.values(way, setting, step))
            ]
            if pairs:
                place, mean, deviation = np.array(pairs).T
                colour, marker = _look(number)
                axes.errorbar(
                    place,
                    mean,
                    deviation,
                    color=colour,
                    marker=marker,
                    capsize=3,
                    label=_label(way),
                )
        axes.set_xticks(range(len(steps)), steps)
        axes.set_title(setting[1])
        axes.set_ylabel("top-1 in %")
    panels[0].legend()
    title = f"{network}: accuracy step by step"
    figure.suptitle(title)
    return Chart(_file_name(network, "steps"), title, figure)


def _spared(found: Standings, results: Results, network: str, settings: Sequence[Setting]) -> Chart:
    """The share of each layer's filters that stays, a panel a target."""

    def kept(result: RunResult) -> dict[str, float]:
        return {group.name: 1 - len(group.removed) / group.filters for group in result.groups}

    figure, panels = _figure(len(settings), rows=_layers(results, settings))
    for axes, setting in zip(panels, settings, strict=True):
        _heat(axes, *_by_layer(found.ways, results, setting, kept), low=0.0)
        axes.set_title(setting[1])
    title = f"{network}: share of filters kept by layer"
    figure.suptitle(title)
    return Chart(_file_name(network, "spared"), title, figure)


def _agreement(
    found: Standings, results: Results, network: str, settings: Sequence[Setting]
) -> list[Chart]:
    """Spearman's rank correlation of each criterion's scores with the baseline's, by layer."""
    setting = next((each for each in settings if (found.baseline, each) in results), None)
    if setting is None or len(found.ways) < 2:
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

    figure, (axes,) = _figure(1, rows=_layers(results, [setting]))
    _heat(axes, *_by_layer(found.ways, results, setting, agreement), low=-1.0)
    title = f"{network}: rank correlation of filter scores with {found.baseline}'s by layer"
    figure.suptitle(title, fontsize="medium")
    return [Chart(_file_name(network, "agreement"), title, figure)]


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


def _heat(
    axes: Axes,
    layers: Sequence[str],
    ways: Sequence[str],
    table: npt.NDArray[np.float64],
    low: float,
) -> None:
    """A table as colours, with its numbers."""
    axes.imshow(table, vmin=low, vmax=1, cmap="RdBu" if low < 0 else "Greens", aspect="auto")
    axes.set_xticks(
        range(len(ways)), map(_label, ways), rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(layers)), layers, fontsize="x-small")
    axes.grid(visible=False)
    for (row, column), number in np.ndenumerate(table):
        if not np.isnan(number):
            colour = "white" if abs(number) > 0.75 else "black"
            text = axes.text(column, row, f"{number:.2f}", color=colour, fontsize="x-small")
            text.set(ha="center", va="center")


def _figure(panels: int, rows: int = 0) -> tuple[Figure, Sequence[Axes]]:
    """A figure of panels side by side, high enough for so many rows of text."""
    figure = Figure(figsize=(5.2 * panels, max(3.8, 0.22 * rows + 1.4)))
    return figure, figure.subplots(1, panels, squeeze=False)[0].tolist()


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


def _look(number: int) -> tuple[str, str]:
    """Colour and marker of a way; no two of the first sixty-four share both."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def _label(way: str) -> str:
    """A name that leaves room for the drawing, without the folders of a criterion of one's own."""
    name = way.rpartition("/")[2]
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"


def _file_name(*parts: str) -> str:
    text = "-".join(parts)
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text)
