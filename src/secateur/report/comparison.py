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

from secateur.comparison import Comparison, way_of
from secateur.report import render
from secateur.result import Stage
from secateur.standings import CONFIDENCE, Difference, Setting, Standings, standings
from secateur.sweep import CellResult, replace_file

ROWS, CSV, MARKDOWN, PAGE = "cells.jsonl", "cells.csv", "comparison.md", "comparison.html"
CHARTS = "charts"
STAGES: tuple[Stage, ...] = ("cut", "refit", "polished", "tuned")


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
    folder: Path, comparison: Comparison, cells: Sequence[CellResult], command: str | None = None
) -> None:
    """Writes the rows, the tables and the charts into the folder of a comparison."""
    rows = [flat(cell) for cell in cells]
    replace_file(folder / ROWS, "".join(json.dumps(each) + "\n" for each in rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(folder / CSV, text.getvalue())
    found = tables(comparison, cells)
    parts = [f"## {table.title}\n\n{table.markdown()}\n" for table in found]
    replace_file(folder / MARKDOWN, "\n".join(parts))
    from secateur.report.charts import charts  # takes a second to import

    drawn = charts(standings(cells, comparison.compared_with))
    if drawn:
        (folder / CHARTS).mkdir(exist_ok=True)
    for chart in drawn:
        chart.write_png(folder / CHARTS)
    page = render(
        "comparison.html.j2",
        tables=found,
        charts=drawn,
        config=comparison.model_dump(mode="json", exclude_unset=True),
        environments=_environments(cells),
        command=command,
    )
    replace_file(folder / PAGE, page)


def flat(cell: CellResult) -> dict[str, Any]:
    """A cell without nesting, for a data frame; accuracies are fractions, None where there is none.

    Sizes left are fractions of the network before the cut.
    """
    found: dict[str, Any] = {
        "network": cell.network,
        "variant": cell.variant,
        "criterion": cell.criterion,
        "target": cell.target,
        "seed": cell.seed,
        "outcome": cell.outcome,
        "reason": cell.reason,
        "score_on": cell.score_on,
    }
    result = cell.result
    for stage in ("before", *STAGES):
        score = None if result is None else result.score(stage)
        found[f"{stage}_top1_fraction"] = None if score is None else score.top1_fraction
    last = None if result is None else result.stages[-1].score
    before = None if result is None else result.score("before")
    for size in ("macs", "parameters", "latency_ms"):
        whole = getattr(before, size, None)
        found[f"{size.removesuffix('_ms')}_left"] = whole and getattr(last, size) / whole
    tuning = None if result is None else result.tuning
    found |= {
        "images": None if last is None else last.images,
        "top1_fraction": None if last is None else last.top1_fraction,
        "best_epoch": None if tuning is None else tuning.best_epoch,
        "best_epoch_top1_fraction": None if tuning is None else tuning.best.top1_fraction,
        "law_error": None if result is None else result.law_error,
        "seconds": None if result is None else round(sum(s.seconds for s in result.stages), 1),
        "plan_hash": None if result is None else result.plan_hash,
        "id": cell.id,
    }
    environment = {} if result is None else result.environment.model_dump()
    return found | {
        name: environment.get(name)
        for name in ("secateur", "torch", "processor", "cores", "threads")
    }


def tables(comparison: Comparison, cells: Sequence[CellResult]) -> tuple[TextTable, ...]:
    """Accuracy at the end, differences to the baseline, accuracy by stage, sizes, and failures."""
    found = standings(cells, comparison.compared_with)
    some = [accuracy_table(found, comparison), difference_table(found)]
    stages = [stage for stage in STAGES if _came_to(found, stage)]
    if len(stages) > 1:
        some.append(stage_table(found, stages))
    some.append(size_table(found))
    if found.failures:
        some.append(failure_table(found.failures))
    return tuple(some)


def accuracy_table(found: Standings, comparison: Comparison) -> TextTable:
    """Mean ± standard deviation over seeds, the best mean first."""
    lines = []
    for way in found.ways:
        values = [list(found.values(way, setting).values()) for setting in found.settings]
        means = [statistics.mean(each) for each in values if each]
        # A mean over fewer settings is another mean; such rows come last.
        mean = statistics.mean(means) if means and len(means) == len(values) else None
        texts = [_spread(each) for each in values]
        lines.append((mean, (way, *texts, "–" if mean is None else f"{mean:.2f}")))
    lines.sort(key=lambda line: -math.inf if line[0] is None else line[0], reverse=True)
    bases = {
        setting: list(found.values(found.baseline, setting, "before").values())
        for setting in found.settings
    }
    before = ", ".join(
        f"{network} {statistics.mean(values):.2f}"
        for network, values in {network: v for (network, _), v in bases.items() if v}.items()
    )
    images = {
        result.stages[0].score.images
        for results in found.results.values()
        for result in results.values()
    }
    counts = sorted({len(results) for results in found.results.values()}) or [0]
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    note = (
        f"Top-1 in % of {' or '.join(map(str, sorted(images)))} {comparison.score_on} images, mean "
        f"± standard deviation over {seeds} seed{'' if counts[-1] == 1 else 's'}. Before the cut: "
        f"{before}."
    )
    return TextTable(
        "Accuracy",
        ("way", *map(_heading, found.settings), "mean"),
        tuple(texts for _, texts in lines),
        note if images else "",
    )


def difference_table(found: Standings) -> TextTable:
    """Each way less the baseline, with the interval and what it supports."""
    lines = []
    for way in found.ways:
        if way == found.baseline:
            continue
        single = [_difference(found.difference(way, setting)) for setting in found.settings]
        overall = found.overall(way)
        verdict = "–" if overall is None else overall.verdict
        lines.append((way, *single, _difference(overall), verdict))
    note = (
        f"Points of top-1, by seed paired with the baseline's, with {CONFIDENCE:.0%} intervals "
        "(Student's t over the seeds; not corrected for how many there are). An interval tells of "
        "other probe images and other training, not of other test images."
    )
    return TextTable(
        f"Difference to {found.baseline}",
        ("way", *map(_heading, found.settings), "all settings", "verdict"),
        tuple(lines),
        note,
    )


def stage_table(found: Standings, stages: Sequence[Stage]) -> TextTable:
    """Mean accuracy after each step."""
    lines = []
    for way in found.ways:
        texts = []
        for setting in found.settings:
            means = [list(found.values(way, setting, stage).values()) for stage in stages]
            texts.append(" → ".join(f"{statistics.mean(m):.2f}" if m else "–" for m in means))
        lines.append((way, *texts))
    heads = ("way", *map(_heading, found.settings))
    return TextTable(f"Step by step: {' → '.join(stages)}", heads, tuple(lines))


def size_table(found: Standings) -> TextTable:
    """What is left of MACs, parameters and latency."""
    lines = []
    for way in found.ways:
        texts = []
        for setting in found.settings:
            pairs = [
                (result.stages[-1].score, result.stages[0].score)
                for result in found.results.get((way, setting), {}).values()
            ]
            shares = (
                statistics.mean(getattr(last, size) / getattr(first, size) for last, first in pairs)
                for size in ("macs", "parameters", "latency_ms")
                if pairs
            )
            texts.append(" / ".join(f"{share:.3f}" for share in shares) or "–")
        lines.append((way, *texts))
    note = (
        "MACs / parameters / latency left, means over seeds. Latency is that of a batch of 16, "
        "timed while other cells may be at work: only roughly right unless one works at a time."
    )
    heads = ("way", *map(_heading, found.settings))
    return TextTable("What is left", heads, tuple(lines), note)


def failure_table(failures: Iterable[CellResult]) -> TextTable:
    """Cells without a result, by what went wrong."""
    by_reason: dict[str, list[CellResult]] = {}
    for cell in failures:
        by_reason.setdefault(cell.reason, []).append(cell)
    lines = []
    for reason, cells in by_reason.items():
        first = cells[0]
        way = way_of(first.criterion, first.variant)
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        lines.append((f"{first.network}, {way}, {first.target}, seed {first.seed}{more}", reason))
    return TextTable("Failed", ("cells", "reason"), tuple(lines))


def _environments(cells: Sequence[CellResult]) -> list[Mapping[str, Any]]:
    """The places where cells were worked on, each once."""
    found = {
        json.dumps(cell.result.environment.model_dump(), sort_keys=True)
        for cell in cells
        if cell.result is not None
    }
    return [json.loads(text) for text in sorted(found)]


def _came_to(found: Standings, stage: Stage) -> bool:
    return any(
        result.score(stage) is not None
        for results in found.results.values()
        for result in results.values()
    )


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
