"""What all charts share: style, figures, heat maps, and output as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secateur.runtime.atomic_io import replace_file

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, which is small and can be read out and searched
    "svg.hashsalt": "secateur",  # the same drawing is the same file
    "text.parse_math": False,  # names are not formulas
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.constrained_layout.use": True,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
"""Distinguishable with colour blindness (Okabe & Ito, 2008, "Color Universal Design")."""
MARKERS = "osD^vPX*"
DPI = 150
MAX_LABEL = 28


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure with a title."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    figure: Figure

    def svg(self) -> Markup:
        """Return the figure as SVG for an HTML page; screen readers read the title."""
        text = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        start = svg.index("<svg") + len("<svg")
        label = Markup(' role="img" aria-label="{}"').format(self.title)
        return Markup(f"<svg{label}{svg[start:]}")

    def write_png(self, folder: Path) -> Path:
        """Write the figure to a folder as PNG, and return its path."""
        path, content = folder / f"{self.name}.png", io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(content, dpi=DPI)
        replace_file(path, content.getvalue())
        return path


def draw_heatmap(
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    table: npt.NDArray[np.float64],
    low: float,
    high: float = 1.0,
    number_format: str = ".2f",
) -> None:
    """Draw a table as colours, with its numbers; NaN leaves a cell empty."""
    axes.imshow(table, vmin=low, vmax=high, cmap="RdBu" if low < 0 else "Greens", aspect="auto")
    axes.set_xticks(
        range(len(columns)), map(short, columns), rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(rows)), map(short, rows), fontsize="x-small")
    axes.grid(visible=False)
    for (row, column), number in np.ndenumerate(table):
        if not np.isnan(number):
            colour = "white" if abs(number) > 0.75 * high else "black"
            text = axes.text(
                column, row, f"{number:{number_format}}", color=colour, fontsize="x-small"
            )
            text.set(ha="center", va="center")


def make_figure(panels: int, rows: int = 0) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with panels side by side, high enough for `rows` lines of text."""
    figure = Figure(figsize=(5.2 * panels, max(3.8, 0.22 * rows + 1.4)))
    return figure, figure.subplots(1, panels, squeeze=False)[0].tolist()


def line_style(number: int) -> tuple[str, str]:
    """Return colour and marker of a line; the first 64 combinations are all different."""
    turn, place = divmod(number, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def short(name: str) -> str:
    """Return a name without its folders, cut to fit beside a chart."""
    name = name.rpartition("/")[2]
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…"


def file_name(*parts: str) -> str:
    """Join parts with dashes, which also replace characters that are unsafe in file names."""
    text = "-".join(parts)
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text)
