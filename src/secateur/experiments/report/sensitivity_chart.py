"""The sensitivity of each layer as small charts: what is lost against what stays."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.experiments.report.html import read_script, render
from secateur.pruning.outcome import SENSITIVITY_COLUMNS, Sensitivity, sensitivity_rows
from secateur.runtime.atomic_io import replace_file
from secateur.runtime.errors import UsageError

MOST_POINTS = 64
"""Points of a curve."""
WIDTH, HEIGHT = 100, 50
"""Of a chart, in its own units."""
LINES = (0.1, 1.0)
"""Errors that a line is drawn at."""
SUFFIXES = (".html", ".csv")


@dataclass(frozen=True)
class Tile:
    """The chart of one layer."""

    name: str
    filters: int
    removed: int | None
    """What the plan removes; None before any plan."""
    error: float | None
    """What that is estimated to lose."""
    curve: str
    """SVG path."""
    mark: tuple[float, float] | None
    """Where the plan is on the curve."""


@dataclass(frozen=True)
class SensitivityChart:
    """The charts of all layers, on one scale."""

    tiles: tuple[Tile, ...]
    most: float
    """The error at the upper edge."""
    lines: tuple[tuple[float, float], ...]
    """Errors that a line is drawn at, and its height."""


def make_sensitivity_chart(
    sensitivity: Sensitivity, removed: Mapping[str, int] | None = None
) -> SensitivityChart:
    """Return the chart of sensitivity curves, with the numbers of filters that a plan removes.

    Heights are square roots of the errors: most layers lose little until few filters are left.
    """
    most = max((max(curve) for curve in sensitivity.values()), default=0.0) or 1.0

    def height(error: float) -> float:
        return round(HEIGHT * (1 - math.sqrt(max(0.0, error) / most)), 2)

    tiles = []
    for name, curve in sensitivity.items():
        filters = len(curve) - 1
        step = max(1, filters // MOST_POINTS)
        counts = sorted({*range(0, filters + 1, step), filters})
        points = [f"{WIDTH * n / filters:.4g} {height(curve[n]):.4g}" for n in counts]
        count = None if removed is None else removed.get(name, 0)
        tiles.append(
            Tile(
                name,
                filters,
                count,
                None if count is None else curve[count],
                "M" + "L".join(points),
                None
                if count is None
                else (round(WIDTH * count / filters, 2), height(curve[count])),
            )
        )
    lines = tuple((error, height(error)) for error in LINES if error < most)
    return SensitivityChart(tuple(tiles), most, lines)


def check_path(path: Path) -> None:
    """Raise `UsageError` if a file for sensitivity curves has another suffix, or no folder."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"the sensitivity file {path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} to write {path.name} in")


def write_sensitivity(path: Path, name: str, sensitivity: Sensitivity) -> None:
    """Write sensitivity curves of a network: as a page (`.html`), or as a table (`.csv`).

    Raises:
        UsageError: See `check_path`.
        WriteError: The file can't be written.
    """
    check_path(path)
    if path.suffix == ".html":
        page = render(
            "sensitivity.html.j2",
            name=name,
            sensitivity=make_sensitivity_chart(sensitivity),
            script=read_script("theme.js"),
        )
        replace_file(path, page)
        return
    rows = sensitivity_rows(sensitivity)
    text = io.StringIO()
    writer = csv.DictWriter(text, SENSITIVITY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())
