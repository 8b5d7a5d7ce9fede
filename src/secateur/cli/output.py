"""What the command line prints: tables for people, JSON for machines."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur.cli.console import escaped, out
from secateur.config import ENGINE_TITLES, EngineName
from secateur.experiments import run_folder
from secateur.experiments.evaluate import Evaluation
from secateur.experiments.inspect import NEEDED, NEEDED_BY
from secateur.experiments.int8_export import Int8Result
from secateur.experiments.onnx_export import ExportResult, Latency
from secateur.experiments.other_formats import FormatResult
from secateur.experiments.report.benchmark import TextTable
from secateur.experiments.report.page import count_text, score_rows
from secateur.models.score import Score, metric_text
from secateur.models.task import Task
from secateur.pipeline.estimate import Estimate
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext
from secateur.pipeline.verdict import verdict
from secateur.pruning.outcome import Sensitivity, sensitivity_rows
from secateur.runtime import distributed
from secateur.runtime.errors import UsageError
from secateur.runtime.progress import (
    ProgressCallback,
    StageLines,
    duration_text,
    live_progress,
    no_progress,
    print_to_stderr,
)
from secateur.runtime.trackers import Tracker

HEAD = 12
"""Characters of a line of a table's head."""
SENSITIVITY_SHOWN = (0.25, 0.5, 0.75)
"""Removed fractions that sensitivities are printed for; bars are those of the second."""
BAR = 8
"""Characters of the longest bar."""


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """If the block is interrupted, say what a folder keeps of its work, and how to resume."""
    existed = folder.exists()
    try:
        yield
    except KeyboardInterrupt as stop:
        if (folder / run_folder.CHECKPOINTS).is_dir() or (not existed and folder.exists()):
            stop.add_note(f"the same command with --resume resumes from {folder}")
        else:
            stop.add_note(f"{folder} is as it was" if existed else "nothing was written")
        raise


def command_line() -> str:
    """Return the command line of this process."""
    return shlex.join(["secateur", *sys.argv[1:]])


def progress() -> ProgressCallback:
    """Return progress bars on stderr if it is a terminal, else no progress."""
    return live_progress() if distributed.is_main_process() else no_progress


def stage_lines() -> StageLines:
    """Return what prints a line to stderr when a stage or an epoch has ended."""
    return StageLines(print_to_stderr if distributed.is_main_process() else None)


def run_context(tracker: Tracker | None = None) -> RunContext:
    """Return where a run of this command reports to."""
    return RunContext(progress(), stage_lines(), command_line(), tracker)


def show_estimate(expected: Estimate, *, as_json: bool) -> None:
    """Print how long a run would take, and how much memory."""
    print(json.dumps(asdict(expected), indent=1) if as_json else expected)


def show_run(result: RunResult, folder: Path, seconds: float, *, as_json: bool) -> None:
    """Print the result of a run, stage by stage, and in how many seconds it was there."""
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    rows = score_rows(result)
    table = Table(box=None, pad_edge=False)
    shown = [key for key in rows[0] if key != "top-5 %"]  # a line has 80 characters
    for number, key in enumerate(shown):
        head = textwrap.fill(key, HEAD)
        table.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[key] for key in shown))
    out().print(table)
    for trial in result.size_trials:
        out().print(
            f"{trial.fraction_left:7.3f} left: "
            f"{result.task.describe(trial.validation_metric)} on the validation images"
            f"{'' if trial.kept else ', too little'}",
            highlight=False,
        )
    out().print(f"{result.removed_text}; {duration_text(seconds)} in all", highlight=False)
    show_unreadable(result.unreadable)
    show_notes(result.notices)
    out().print(f"{verdict(result)}.", soft_wrap=True, highlight=False, style="bold")
    out().print(f"report: {folder / run_folder.REPORT}", soft_wrap=True, highlight=False)


def show_benchmark(tables: Sequence[TextTable], verdict_text: str) -> None:
    """Print the tables of a benchmark, and its verdict."""
    for table in tables:
        shown = Table(title=table.title, title_justify="left", box=None, pad_edge=False)
        for number, head in enumerate(table.heads):
            shown.add_column(escaped(head), justify="left" if number == 0 else "right")
        for line in table.rows:
            shown.add_row(*map(escaped, line))
        out().print(shown)
        out().print(escaped(table.note), highlight=False)
    out().print(f"{escaped(verdict_text)}.", highlight=False, style="bold")


def show_unreadable(names: Sequence[str]) -> None:
    """Print how many images were skipped, and some of their names."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        out().print(
            f"{len(names)} images can't be read and were left out: "
            f"{', '.join(map(escaped, names[:3]))}{more}",
            soft_wrap=True,
            highlight=False,
        )


def show_notes(notes: Sequence[str]) -> None:
    """Print what to know of a result."""
    for note in notes:
        out().print(f"[yellow]note:[/] {escaped(note)}", soft_wrap=True, highlight=False)


def show_evaluation(evaluation: Evaluation, *, as_json: bool) -> None:
    """Print the score of a network, the skipped images if they were recorded, and notes."""
    if as_json:
        skipped = {} if evaluation.unreadable is None else {"unreadable": evaluation.unreadable}
        facts = {**asdict(evaluation.score), **skipped, "notes": evaluation.notes}
        if evaluation.original_ms is not None:
            facts["original_latency_ms"] = evaluation.original_ms
        print(json.dumps(facts, indent=1))
        return
    show_score(evaluation.score, evaluation.task, evaluation.engine, evaluation.original_ms)
    show_unreadable(evaluation.unreadable or ())
    show_notes(evaluation.notes)


def show_score(
    score: Score, task: Task, engine: EngineName, original_ms: float | None = None
) -> None:
    """Print a score, and the latency of the original network if it is known."""
    before = "" if original_ms is None else f"; the original {original_ms:.1f} ms"
    table = Table(box=None, show_header=False, pad_edge=False)
    top5, agreement = score.top5_fraction, score.agreement_fraction
    for title, text in (
        ("images", str(score.images)),
        *(
            [(task.accuracy_name, metric_text(score.metric, task.metric_unit))]
            if task.has_metric
            else []
        ),
        *([] if top5 is None else [("top-5", f"{100 * top5:.2f} %")]),
        *([] if agreement is None else [("agreement", f"{100 * agreement:.2f} %")]),
        *([] if score.loss is None else [("loss", f"{score.loss:.4f}")]),
        ("MACs", count_text(score.macs)),
        ("parameters", count_text(score.parameters)),
        (
            "latency",
            f"{score.latency_ms:.1f} ms a batch of {score.latency_batch}, "
            f"{ENGINE_TITLES[engine]}{before}",
        ),
    ):
        table.add_row(title, text)
    out().print(table)


def show_export(
    result: ExportResult | FormatResult,
    times: tuple[Latency, ...],
    quantised: Int8Result | None = None,
    notes: Sequence[str] = (),
    *,
    as_json: bool,
) -> None:
    """Print which files were written, the latency of both networks, and notes."""
    notes = [*notes, *(() if quantised is None else quantised.notes)]
    if as_json:
        facts = {**asdict(result), "path": str(result.path), "notes": notes}
        facts["latency"] = [asdict(one) for one in times]
        if quantised is not None:
            facts["int8"] = _int8_facts(quantised)
        print(json.dumps(facts, indent=1))
        return
    error = (
        "not run here: its engine is on other machines"
        if result.error is None
        else f"relative error {result.error:.1e}"
    )
    if isinstance(result, ExportResult):
        batches = ", ".join(str(batch) for batch in result.batches)
        text = f"opset {result.opset}; {error} in batches of {batches}"
    elif result.batch is None:
        text = f"any number of images; {error}"
    else:
        text = f"images at a time: {result.batch}; {error}"
    out().print(f"written: {result.path}", soft_wrap=True, highlight=False)
    out().print(f"{result.bytes / 1e6:.2f} MB, {text}", highlight=False)
    if times:
        _show_latency(times)
    if quantised is not None:
        show_int8(quantised)
    show_notes(notes)


def _show_latency(times: tuple[Latency, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("engine")
    for title in ("batch", "original ms", "pruned ms", "ratio"):
        table.add_column(title, justify="right")
    for one in times:
        original = one.original_ms
        table.add_row(
            one.engine,
            str(one.batch),
            "" if original is None else f"{original:.2f}",
            f"{one.pruned_ms:.2f}",
            "" if original is None else f"{original / one.pruned_ms:.2f}",
        )
    out().print(table)


def _int8_facts(quantised: Int8Result) -> dict[str, Any]:
    """Return what JSON says of an int8 file."""
    return {
        "path": str(quantised.path),
        "bytes": quantised.bytes,
        "calibration_images": quantised.calibration_images,
        "metric": quantised.task.accuracy_name,
        "float_metric": quantised.float_score.metric,
        "int8_metric": quantised.int8_score.metric,
        "latency": [asdict(one) for one in quantised.latency],
    }


def show_int8(quantised: Int8Result) -> None:
    """Print an int8 file's accuracy and latency beside those of the float file."""
    unit, name = quantised.task.metric_unit, quantised.task.accuracy_name
    before, after = quantised.float_score, quantised.int8_score
    out().print(f"written: {quantised.path}", soft_wrap=True, highlight=False)
    out().print(
        f"{quantised.bytes / 1e6:.2f} MB in int8, calibrated on {quantised.calibration_images} "
        f"images; {name} {metric_text(before.metric, unit)} in float, "
        f"{metric_text(after.metric, unit)} in int8 ({after.images} test images)",
        highlight=False,
    )
    if not quantised.latency:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(quantised.engine)
    for title in ("batch", "original ms", "pruned ms", "ratio"):
        table.add_column(title, justify="right")
    for one in quantised.latency:
        for form, pruned, original in (
            ("float", one.float_ms, one.original_float_ms),
            ("int8", one.int8_ms, one.original_int8_ms),
        ):
            table.add_row(
                form,
                str(one.batch),
                "" if original is None else f"{original:.2f}",
                f"{pruned:.2f}",
                "" if original is None else f"{original / pruned:.2f}",
            )
    out().print(table)
    advice = quantised.advice
    if advice:
        show_notes([advice])


def show_sensitivity(sensitivity: Sensitivity, path: Path, *, as_json: bool) -> None:
    """Print what the output loses if some of the filters of a layer go, and the file's path."""
    if as_json:
        print(json.dumps(sensitivity_rows(sensitivity), indent=1))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column("filters", justify="right")
    for removed in SENSITIVITY_SHOWN:
        table.add_column(f"−{removed:.0%}", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    errors = {
        name: [curve[round(removed * (len(curve) - 1))] for removed in SENSITIVITY_SHOWN]
        for name, curve in sensitivity.items()
    }
    largest = max((row[1] for row in errors.values()), default=0.0) or 1.0
    for name, row in errors.items():
        bar = "█" * round(BAR * row[1] / largest)
        filters = str(len(sensitivity[name]) - 1)
        table.add_row(escaped(name), filters, *(f"{error:.3g}" for error in row), bar)
    out().print("error at the output if some of the filters of one layer go, the worst first")
    out().print(table)
    out().print(f"written: {path}", soft_wrap=True, highlight=False)


def show_groups(inspection: dict[str, Any]) -> None:
    """Print a line for each prunable layer, then for each frozen one with the reason."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("filters", "needed", "MACs %"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("detectors", justify="right", no_wrap=True)
    largest = max((group["macs_share"] for group in inspection["groups"]), default=1.0)
    for group in inspection["groups"]:
        detected = [seen["concept"] for seen in group["concepts"] if seen["is_detector"]]
        table.add_row(
            escaped(group["layer"]),
            str(group["filters"]),
            str(group["needed"]),
            f"{100 * group['macs_share']:.1f}",
            "█" * round(BAR * group["macs_share"] / largest),
            f"{len(detected)} ({len(set(detected))})",
        )
    out().print(table)
    out().print(
        f"needed: filters that hold {NEEDED:.0%} of the layer's votes by {NEEDED_BY}; detectors: "
        "filters that overlap a concept, and of how many concepts",
        highlight=False,
    )
    if not inspection["frozen"]:
        return
    frozen = Table(box=None, pad_edge=False)
    frozen.add_column("frozen", overflow="fold")
    frozen.add_column("filters", justify="right", no_wrap=True)
    frozen.add_column("because")
    for group in inspection["frozen"]:
        reason = escaped(group["reason"])
        frozen.add_row(escaped(group["layer"]), str(group["filters"]), reason)
    out().print(frozen)


def show_filters(group: dict[str, Any]) -> None:
    """Print a line for each filter of a layer."""
    table = Table(box=None, pad_edge=False)
    table.add_column("filter", justify="right")
    for name in group["scores"]:
        table.add_column(name, justify="right")
    table.add_column("best concept")
    table.add_column("IoU", justify="right")
    if group["names"]:
        table.add_column("name")
        table.add_column("similarity", justify="right")
    for number, seen in enumerate(group["concepts"]):
        scores = [f"{values[number]:.4g}" for values in group["scores"].values()]
        cells = [*scores, escaped(seen["concept"]), f"{seen['iou']:.3f}"]
        name = group["names"][number] if group["names"] else None
        if name is not None:
            cells += [escaped(name["word"]), f"{name['similarity']:.3f}"]
        table.add_row(str(number), *cells)
    out().print(table)


def show_filter(group: dict[str, Any], number: int) -> None:
    """Print one filter's concepts, top images, and where it is active in the first of them."""
    if number >= group["filters"]:
        raise UsageError(f"{group['layer']} has filters 0 to {group['filters'] - 1}, not {number}")
    lines = [f"{group['layer']}, filter {number} of {group['filters']}"]
    for name, scores in group["scores"].items():
        rank = 1 + sum(other > scores[number] for other in scores)
        lines.append(f"{name}: {scores[number]:.4g}, rank {rank} of {group['filters']}")
    seen = group["concepts"][number]
    kind = "detector of" if seen["is_detector"] else "overlaps most"
    lines.append(f"{kind} {seen['concept']}, IoU {seen['iou']:.3f}")
    if group["names"] and group["names"][number] is not None:
        name = group["names"][number]
        lines.append(f"named {name['word']}, similarity {name['similarity']:.3f}")
    tops = group["top_images"][number]
    lines.append(
        f"top calibration images: {', '.join(map(str, tops))}; where it is active in {tops[0]}:"
    )
    lines += [
        "  " + row.replace("#", "██").replace(".", "··") for row in group["top_regions"][number]
    ]
    out().print(escaped("\n".join(lines)), highlight=False)
