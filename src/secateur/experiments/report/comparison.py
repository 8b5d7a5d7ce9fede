"""A comparison as tables: on a terminal, as Markdown, as one HTML page, as CSV and JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.experiments.compare.results import STAGES, Row, row_of, to_lines
from secateur.experiments.compare.runner import JobResult
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.compare.statistics import (
    CONFIDENCE,
    BenchmarkStatistics,
    Difference,
    Setting,
    compute_statistics,
)
from secateur.experiments.report import read_script, render
from secateur.pipeline.result import Stage
from secateur.runtime.atomic_io import make_inner_folder, replace_file

ROWS, CSV, MARKDOWN, PAGE = "jobs.jsonl", "jobs.csv", "benchmark.md", "benchmark.html"
CHARTS = "charts"
SIZES = ("macs", "parameters", "latency")


@dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column names its rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown, without the title."""
        lines = [self.heads, ("---",) * len(self.heads), *self.rows]
        text = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text


def write_comparison(
    folder: Path, comparison: BenchmarkSpec, cells: Sequence[JobResult], command: str | None = None
) -> None:
    """Writes the rows, the tables and the charts into the folder of a comparison."""
    rows = [row_of(cell) for cell in cells]
    replace_file(folder / ROWS, to_lines(rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    replace_file(folder / CSV, text.getvalue())
    found = compute_statistics(rows, comparison.compared_with)
    shown = tables(found)
    parts = [f"## {table.title}\n\n{table.markdown()}\n" for table in shown]
    replace_file(folder / MARKDOWN, "\n".join(parts))
    from secateur.experiments.report.charts import charts  # takes a second to import

    drawn = charts(found, cells)
    if drawn:
        make_inner_folder(folder / CHARTS)
    for chart in drawn:
        chart.write_png(folder / CHARTS)
    page = render(
        "benchmark.html.j2",
        tables=shown,
        charts=drawn,
        config=comparison.model_dump(mode="json", exclude_unset=True),
        environments=_environments(cells),
        command=command,
        script=read_script("theme.js"),
    )
    replace_file(folder / PAGE, page)


def tables(found: BenchmarkStatistics) -> tuple[TextTable, ...]:
    """Accuracy at the end, differences to the baseline, accuracy by stage, sizes, and failures."""
    some = [accuracy_table(found), difference_table(found)]
    stages = [
        stage
        for stage in STAGES[1:]
        if any(row.percent(stage) is not None for row in found.all_rows)
    ]
    if len(stages) > 1:
        some.append(stage_table(found, stages))
    some.append(size_table(found))
    if found.failures:
        some.append(failure_table(found.failures))
    return tuple(some)


def accuracy_table(found: BenchmarkStatistics) -> TextTable:
    """Mean ± standard deviation over seeds, the best mean first."""
    lines = []
    for way in found.methods:
        values = [list(found.values(way, setting).values()) for setting in found.settings]
        means = [statistics.mean(each) for each in values if each]
        # A mean over fewer settings is another mean; such rows come last.
        mean = statistics.mean(means) if means and len(means) == len(found.measured) else None
        texts = [_spread(each) for each in values]
        lines.append((mean, (way, *texts, "–" if mean is None else f"{mean:.2f}")))
    lines.sort(key=lambda line: -math.inf if line[0] is None else line[0], reverse=True)
    bases: dict[str, float] = {}
    for network, target in found.settings:
        for way in (*found.methods, found.baseline):  # the baseline's where there are any
            if by_seed := found.values(way, (network, target), "before"):
                bases[network] = statistics.mean(by_seed.values())
    before = ", ".join(f"{network} {base:.2f}" for network, base in bases.items())
    images = sorted({row.images for row in found.all_rows if row.images})
    kinds = sorted({row.score_on for row in found.all_rows})
    counts = sorted({len(rows) for rows in found.rows.values()}) or [0]
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    note = (
        f"Top-1 in % of {' or '.join(map(str, images))} {' or '.join(kinds)} images, mean ± "
        f"standard deviation over {seeds} seed{'' if counts[-1] == 1 else 's'}. Before the cut: "
        f"{before}."
    )
    return TextTable(
        "Accuracy",
        ("way", *map(_heading, found.settings), "mean"),
        tuple(texts for _, texts in lines),
        note if images else "",
    )


def difference_table(found: BenchmarkStatistics) -> TextTable:
    """Each way less the baseline, with the interval and what it supports."""
    lines = []
    for way in found.methods:
        if way == found.baseline:
            continue
        single = [_difference(found.difference(way, setting)) for setting in found.settings]
        overall = found.overall(way)
        verdict = "–" if overall is None else overall.verdict
        lines.append((way, *single, _difference(overall), verdict))
    note = (
        f"Points of top-1, by seed paired with the baseline's, with {CONFIDENCE:.0%} intervals "
        "(Student's t over the seeds; not corrected for how many there are). An interval tells of "
        "other calibration images and other training, not of other test images."
    )
    return TextTable(
        f"Difference to {found.baseline}",
        ("way", *map(_heading, found.settings), "all settings", "verdict"),
        tuple(lines),
        note,
    )


def stage_table(found: BenchmarkStatistics, stages: Sequence[Stage]) -> TextTable:
    """Mean accuracy after each step."""
    lines = []
    for way in found.methods:
        texts = []
        for setting in found.settings:
            means = [list(found.values(way, setting, stage).values()) for stage in stages]
            texts.append(" → ".join(f"{statistics.mean(m):.2f}" if m else "–" for m in means))
        lines.append((way, *texts))
    heads = ("way", *map(_heading, found.settings))
    return TextTable(f"Step by step: {' → '.join(stages)}", heads, tuple(lines))


def size_table(found: BenchmarkStatistics) -> TextTable:
    """What is left of MACs, parameters and latency."""
    lines = []
    for way in found.methods:
        texts = []
        for setting in found.settings:
            rows = found.rows.get((way, setting), {}).values()
            sizes = [[getattr(row, f"{size}_left") for row in rows] for size in SIZES]
            shares = [statistics.mean(values) for values in sizes if values and None not in values]
            texts.append(" / ".join(f"{share:.3f}" for share in shares) or "–")
        lines.append((way, *texts))
    note = (
        "MACs / parameters / latency left, means over seeds. Latency is that of a batch of 16, in "
        "turns with the whole network: only roughly right where other cells were at work."
    )
    heads = ("way", *map(_heading, found.settings))
    return TextTable("What is left", heads, tuple(lines), note)


def failure_table(failures: Iterable[Row]) -> TextTable:
    """Cells without a result, by what went wrong."""
    by_reason: dict[str, list[Row]] = {}
    for row in failures:
        by_reason.setdefault(row.reason, []).append(row)
    lines = []
    for reason, rows in by_reason.items():
        first = rows[0]
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        name = f"{first.network}, {first.method}, {first.target}, seed {first.seed}{more}"
        lines.append((name, reason))
    return TextTable("Failed", ("cells", "reason"), tuple(lines))


def _environments(cells: Sequence[JobResult]) -> list[Mapping[str, Any]]:
    """The places where cells were worked on, each once."""
    found = {
        json.dumps(cell.result.environment.model_dump(), sort_keys=True)
        for cell in cells
        if cell.result is not None
    }
    return [json.loads(text) for text in sorted(found)]


def _heading(setting: Setting) -> str:
    return " ".join(setting)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    mean = f"{found.mean:+.2f}"
    return mean if found.seeds == 1 else f"{mean} [{found.low:+.2f}, {found.high:+.2f}]"


def _escaped(text: str) -> str:
    """Text that a cell of a Markdown table shows as it is."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
