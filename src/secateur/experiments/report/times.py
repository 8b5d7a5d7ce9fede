"""The part of a run's report that shows times in engines, which are measured after the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from secateur.config import ENGINE_TITLES
from secateur.experiments.report.html import render
from secateur.pipeline.verdict import EngineTime, slower_notices
from secateur.runtime.atomic_io import replace_file

START, END = "<!-- times in engines -->", "<!-- end of times in engines -->"
HEADS = ("engine", "form", "batch", "threads", "original ms", "pruned ms", "ratio")


def time_rows(times: Sequence[EngineTime]) -> list[tuple[str, ...]]:
    """Return the cells of a table with `HEADS`, a row for each engine, form and batch size."""
    return [
        (
            f"{ENGINE_TITLES[time.engine]} {time.version}",
            time.form,
            str(time.batch),
            str(time.threads),
            "–" if time.original_ms is None else f"{time.original_ms:.2f}",
            f"{time.pruned_ms:.2f}",
            "–" if time.original_ms is None else f"{time.original_ms / time.pruned_ms:.2f}",
        )
        for time in times
    ]


def times_section(times: Sequence[EngineTime]) -> Markup:
    """Return the section between its two marks; between them is nothing if there are no times."""
    section = render(
        "times.html.j2",
        heads=HEADS,
        rows=time_rows(times),
        notices=slower_notices(times),
        processors=sorted({time.processor for time in times}),
    )
    return Markup(f"{START}{section if times else ''}{END}")


def write_times(report: Path, times: Sequence[EngineTime]) -> None:
    """Replace the section in a report; one of an older version, without the marks, stays as it is.

    Raises `WriteError` if it can't be written.
    """
    if not report.is_file():
        return
    head, start, rest = report.read_text(encoding="utf-8").partition(START)
    _, end, tail = rest.partition(END)
    if start and end:
        replace_file(report, f"{head}{times_section(times)}{tail}")
