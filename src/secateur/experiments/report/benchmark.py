"""The results of a benchmark as tables: text, Markdown, LaTeX, one HTML page, CSV, JSON lines."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.experiments.compare.job import JobResult
from secateur.experiments.compare.results import STAGES, Row, row_of, to_lines
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.experiments.compare.statistics import (
    CONFIDENCE,
    BenchmarkStatistics,
    Difference,
    Setting,
    compute_statistics,
)
from secateur.experiments.report.benchmark_summary import benchmark_verdict, protocol
from secateur.experiments.report.html import read_script, render
from secateur.pipeline.result import Stage
from secateur.pipeline.verdict import SAME_LATENCY
from secateur.runtime.atomic_io import make_inner_folder, replace_file

ROWS, CSV, MARKDOWN, PAGE = "jobs.jsonl", "jobs.csv", "benchmark.md", "benchmark.html"
LATEX = "benchmark.tex"
CHARTS = "charts"
MOST_SLOWER = 4
"""Networks that are listed as slower than before."""
SIZES = ("macs", "parameters", "latency")
IN_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "\n": " ",
}
"""What a letter is in LaTeX."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts; the first column names its rows."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        lines = [self.heads, ("---",) * len(self.heads), *self.rows]
        text = "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text

    def latex(self) -> str:
        """Return the table for a LaTeX document that uses the package booktabs."""
        head, *lines = (" & ".join(map(_latex, line)) + r" \\" for line in (self.heads, *self.rows))
        caption = f"{self.title}. {self.note}".strip()
        return "\n".join(
            (
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_latex(caption)}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}",
                *(r"\toprule", head, r"\midrule", *lines, r"\bottomrule"),
                r"\end{tabular}",
                r"\end{table}",
            )
        )


def write_benchmark(
    folder: Path, spec: BenchmarkSpec, results: Sequence[JobResult], command: str | None = None
) -> None:
    """Write the rows, the tables and the charts of a benchmark into its folder."""
    rows = [row_of(result) for result in results]
    replace_file(folder / ROWS, to_lines(rows))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    replace_file(folder / CSV, text.getvalue())
    stats = compute_statistics(rows, spec.compared_with)
    text_tables = tables(stats)
    summary, protocol_text = f"{benchmark_verdict(stats)}.", protocol(spec)
    sections = [f"## {table.title}\n\n{table.markdown()}\n" for table in text_tables]
    opening = f"**{_escape(summary)}**\n\n{_escape(protocol_text)}\n"
    replace_file(folder / MARKDOWN, "\n".join([opening, *sections]))
    heading = "% Needs \\usepackage{booktabs}.\n"
    latex = "\n\n".join(table.latex() for table in text_tables)
    replace_file(folder / LATEX, f"{heading}\n{latex}\n")
    # Takes a second to import.
    from secateur.experiments.report.benchmark_charts import benchmark_charts

    charts = benchmark_charts(stats, results)
    if charts:
        make_inner_folder(folder / CHARTS)
    for chart in charts:
        chart.write_png(folder / CHARTS)
    page = render(
        "benchmark.html.j2",
        verdict=summary,
        protocol=protocol_text,
        tables=text_tables,
        charts=charts,
        config=spec.model_dump(mode="json", exclude_unset=True),
        environments=_environments(results),
        command=command,
        script=read_script("theme.js"),
    )
    replace_file(folder / PAGE, page)


def tables(stats: BenchmarkStatistics) -> tuple[TextTable, ...]:
    """Return the tables: accuracy, differences, accuracy by stage, remaining sizes, failures."""
    text_tables = [accuracy_table(stats), difference_table(stats)]
    stages = [
        stage
        for stage in STAGES[1:]
        if any(row.percent(stage) is not None for row in stats.all_rows)
    ]
    if len(stages) > 1:
        text_tables.append(stage_table(stats, stages))
    text_tables.append(size_table(stats))
    if stats.failures:
        text_tables.append(failure_table(stats.failures))
    return tuple(text_tables)


def accuracy_table(stats: BenchmarkStatistics) -> TextTable:
    """Return mean ± standard deviation over seeds for each method, the best mean first."""
    has_agreement = any(row.agreement_fraction is not None for row in stats.all_rows)
    lines = []
    for method in stats.methods:
        values = [list(stats.values(method, setting).values()) for setting in stats.settings]
        means = [statistics.mean(percents) for percents in values if percents]
        # A mean over fewer settings can't be compared; such rows come last.
        mean = statistics.mean(means) if means and len(means) == len(stats.measured) else None
        texts = [_spread(percents) for percents in values]
        summary = (mean, _mean_agreement(stats, method)) if has_agreement else (mean,)
        lines.append((mean, (method, *texts, *map(_two_digits, summary))))
    lines.sort(key=lambda line: -math.inf if line[0] is None else line[0], reverse=True)
    bases: dict[str, float] = {}
    for network, target in stats.settings:
        for method in (*stats.methods, stats.baseline):  # the baseline's, if there are any
            if by_seed := stats.values(method, (network, target), "before"):
                bases[network] = statistics.mean(by_seed.values())
    before = ", ".join(f"{network} {base:.2f}" for network, base in bases.items())
    images = sorted({row.images for row in stats.all_rows if row.images})
    kinds = sorted({row.score_on for row in stats.all_rows})
    counts = sorted({len(rows) for rows in stats.rows.values()}) or [0]
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    note = (
        f"Top-1 in % of {' or '.join(map(str, images))} {' or '.join(kinds)} images, mean ± "
        f"standard deviation over {seeds} seed{'' if counts[-1] == 1 else 's'}. Before pruning: "
        f"{before}."
    )
    if has_agreement:
        note += (
            " Agreement: images for which the network before pruning predicts the same, a mean "
            "over all settings."
        )
    return TextTable(
        "Accuracy",
        ("method", *map(_heading, stats.settings), "mean", *(["agreement"] * has_agreement)),
        tuple(texts for _, texts in lines),
        note if images else "",
    )


def _mean_agreement(stats: BenchmarkStatistics, method: str) -> float | None:
    """Return a method's agreement with the original networks in %, a mean over all settings."""
    means = []
    for setting in stats.measured:
        rows = stats.rows.get((method, setting), {}).values()
        fractions = [row.agreement_fraction for row in rows if row.agreement_fraction is not None]
        if not fractions:
            return None
        means.append(100 * statistics.mean(fractions))
    return statistics.mean(means) if means else None


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def difference_table(stats: BenchmarkStatistics) -> TextTable:
    """Return the difference of each method to the baseline, with its interval and verdict."""
    lines = []
    for method in stats.methods:
        if method == stats.baseline:
            continue
        differences = [_difference(stats.difference(method, setting)) for setting in stats.settings]
        overall = stats.overall(method)
        verdict = "–" if overall is None else overall.verdict
        lines.append((method, *differences, _difference(overall), verdict))
    note = (
        f"Points of top-1, paired with the baseline by seed, with {CONFIDENCE:.0%} intervals "
        "(Student's t over the seeds, not corrected for multiple comparisons). The intervals cover "
        "other calibration images and another training, not other test images."
    )
    return TextTable(
        f"Difference to {stats.baseline}",
        ("method", *map(_heading, stats.settings), "all settings", "verdict"),
        tuple(lines),
        note,
    )


def stage_table(stats: BenchmarkStatistics, stages: Sequence[Stage]) -> TextTable:
    """Return the mean accuracy after each stage."""
    lines = []
    for method in stats.methods:
        texts = []
        for setting in stats.settings:
            means = [list(stats.values(method, setting, stage).values()) for stage in stages]
            texts.append(" → ".join(f"{statistics.mean(m):.2f}" if m else "–" for m in means))
        lines.append((method, *texts))
    heads = ("method", *map(_heading, stats.settings))
    return TextTable(f"Step by step: {' → '.join(stages)}", heads, tuple(lines))


def size_table(stats: BenchmarkStatistics) -> TextTable:
    """Return the remaining fractions of MACs, parameters and latency."""
    lines = []
    for method in stats.methods:
        texts = []
        for setting in stats.settings:
            rows = stats.rows.get((method, setting), {}).values()
            sizes = [[getattr(row, f"{size}_left") for row in rows] for size in SIZES]
            fractions = [
                statistics.mean(values) for values in sizes if values and None not in values
            ]
            texts.append(" / ".join(f"{fraction:.3f}" for fraction in fractions) or "–")
        lines.append((method, *texts))
    engines = sorted({row.engine for row in stats.all_rows if row.engine})
    measured_in = f" in {' or '.join(engines)}" if engines else ""
    note = (
        "Remaining fraction of MACs / parameters / latency, means over seeds. Latency is measured"
        f"{measured_in} with batches of at most 16, interleaved with the original network; it is "
        f"approximate if other jobs ran at the same time.{_slower_text(stats)}"
    )
    heads = ("method", *map(_heading, stats.settings))
    return TextTable("Remaining size", heads, tuple(lines), note)


def _slower_text(stats: BenchmarkStatistics) -> str:
    """Return which networks are slower than before pruning, and what to do; or nothing."""
    slower = []
    for method, setting in itertools.product(stats.methods, stats.settings):
        rows = stats.rows.get((method, setting), {}).values()
        fractions = [row.latency_left for row in rows if row.latency_left is not None]
        left = statistics.mean(fractions) if fractions else 0.0
        if left > 1 + SAME_LATENCY:
            slower.append(f"{_heading(setting)} by {method} ({left:.2f})")
    if not slower:
        return ""
    named = ", ".join(slower[:MOST_SLOWER])
    more = f" and {len(slower) - MOST_SLOWER} more" if len(slower) > MOST_SLOWER else ""
    return (
        f" Slower than before pruning: {named}{more}. Set plan.round_to = 16, or plan by time, "
        'targets = ["latency=0.7"].'
    )


def failure_table(failures: Iterable[Row]) -> TextTable:
    """Return the failed jobs by their reason."""
    by_reason: dict[str, list[Row]] = {}
    for row in failures:
        by_reason.setdefault(row.reason, []).append(row)
    lines = []
    for reason, rows in by_reason.items():
        first = rows[0]
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        name = f"{first.network}, {first.method}, {first.target}, seed {first.seed}{more}"
        lines.append((name, reason))
    return TextTable("Failed", ("jobs", "reason"), tuple(lines))


def _environments(results: Sequence[JobResult]) -> list[Mapping[str, Any]]:
    """Return the environments that jobs ran in, each once."""
    texts = {
        json.dumps(result.result.environment.model_dump(), sort_keys=True)
        for result in results
        if result.result is not None
    }
    return [json.loads(text) for text in sorted(texts)]


def _heading(setting: Setting) -> str:
    return " ".join(setting)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    mean = f"{difference.mean:+.2f}"
    if difference.seeds == 1:
        return mean
    return f"{mean} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _latex(text: str) -> str:
    return "".join(IN_LATEX.get(letter, letter) for letter in text)


def _escape(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
