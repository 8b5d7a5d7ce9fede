"""Comparisons whose rows go to result files; what has been measured is not measured again."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from rows import ROOT
from secateur.experiments.compare.job import Job, JobResult
from secateur.experiments.compare.results import Row, read_rows, row_of, to_lines
from secateur.experiments.compare.runner import run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec, read_spec
from secateur.experiments.compare.statistics import compute_statistics
from secateur.experiments.report.benchmark import accuracy_table, difference_table
from secateur.runtime.progress import T

Key = tuple[str, str, str, str, int]


def key_of(of: Row | Job) -> Key:
    """What tells a cell from others."""
    return of.network, of.variant, of.criterion, of.target, of.seed


def rows_in(results: Path) -> list[Row]:
    """What has been measured; of rows of one cell the last one."""
    rows = read_rows(results) if results.is_file() else []
    return list({key_of(row): row for row in rows}.values())


def put(results: Path, row: Row) -> None:
    """Appends a row to a result file."""
    with results.open("a") as file:
        file.write(to_lines([row]))


def asked_for(config: Path, arguments: argparse.Namespace) -> BenchmarkSpec:
    """The comparison in a file, with the data and the weights that are given."""
    comparison = read_spec(config).with_weights_in(arguments.weights)
    kind = comparison.data.source.partition(":")[0]
    data = comparison.data.model_copy(update={"source": f"{kind}:{arguments.data}"})
    return comparison.model_copy(update={"data": data})


def measure(comparison: BenchmarkSpec, results: Path, jobs: int) -> None:
    """Works off the cells that a result file lacks, in `runs/`, and appends each as it ends.

    So are those that are done there but had not come to the file.
    """
    known = {key_of(row) for row in rows_in(results)}

    def note(cell: JobResult) -> None:
        row = row_of(cell)
        if cell.outcome == "done" and key_of(row) not in known:
            known.add(key_of(row))
            put(results, row)

    def noted(items: Iterable[T], title: str, total: int) -> Iterator[T]:
        for number, cell in enumerate(items, 1):
            assert isinstance(cell, JobResult)
            print(f"{title} {number}/{total}: {cell.outcome} {cell.reason}", flush=True)
            note(cell)
            yield cell

    found = run_benchmark(
        comparison,
        ROOT / "runs" / results.stem,
        workers=jobs,
        retry=True,
        skip=lambda cell: key_of(cell) in known,
        progress=noted,
    )
    for cell in found:
        note(cell)


def table(config: Path, results: Path) -> str:
    """Accuracies and their differences."""
    rows = rows_in(results)
    if not rows:
        return "Not measured yet."
    found = compute_statistics(rows, read_spec(config).compared_with)
    return "\n\n".join(each.markdown() for each in (accuracy_table(found), difference_table(found)))


def parser(description: str | None) -> argparse.ArgumentParser:
    """What a bench of a comparison is told."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", required=True, help="the folder of CIFAR-10")
    made.add_argument("--weights", type=Path, required=True, help="the folder of base weights")
    made.add_argument("--jobs", type=int, default=1)
    return made
