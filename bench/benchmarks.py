"""Benchmarks whose rows go to result files; rows that are there are not measured again."""

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


def key_of(job: Row | Job) -> Key:
    """Return what identifies a job in a result file."""
    return job.network, job.variant, job.criterion, job.target, job.seed


def measured_rows(results: Path) -> list[Row]:
    """Return the rows of a result file, the last one of each job."""
    rows = read_rows(results) if results.is_file() else []
    return list({key_of(row): row for row in rows}.values())


def append_row(results: Path, row: Row) -> None:
    """Append a row to a result file."""
    with results.open("a") as file:
        file.write(to_lines([row]))


def configured(config: Path, arguments: argparse.Namespace) -> BenchmarkSpec:
    """Return the benchmark in a file, with the data and weights of the command line."""
    spec = read_spec(config).with_weights_in(arguments.weights)
    kind = spec.data.source.partition(":")[0]
    data = spec.data.model_copy(update={"source": f"{kind}:{arguments.data}"})
    return spec.model_copy(update={"data": data})


def measure(spec: BenchmarkSpec, results: Path, workers: int) -> None:
    """Run the jobs that a result file lacks, in `runs/`, and append each row as its job ends.

    Also appends finished jobs of an interrupted run that are not in the file yet.
    """
    known = {key_of(row) for row in measured_rows(results)}

    def note(job: JobResult) -> None:
        row = row_of(job)
        if job.outcome == "done" and key_of(row) not in known:
            known.add(key_of(row))
            append_row(results, row)

    def noting(items: Iterable[T], title: str, total: int) -> Iterator[T]:
        for number, job in enumerate(items, 1):
            assert isinstance(job, JobResult)
            print(f"{title} {number}/{total}: {job.outcome} {job.reason}", flush=True)
            note(job)
            yield job

    job_results = run_benchmark(
        spec,
        ROOT / "runs" / results.stem,
        workers=workers,
        retry=True,
        skip=lambda job: key_of(job) in known,
        progress=noting,
    )
    for job in job_results:
        note(job)


def table(config: Path, results: Path) -> str:
    """Return the tables of accuracies and of their differences."""
    rows = measured_rows(results)
    if not rows:
        return "Not measured yet."
    stats = compute_statistics(rows, read_spec(config).compared_with)
    return f"{accuracy_table(stats).markdown()}\n\n{difference_table(stats).markdown()}"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the command line of such a bench."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of base weights")
    parser.add_argument("--workers", type=int, default=1)
    return parser
