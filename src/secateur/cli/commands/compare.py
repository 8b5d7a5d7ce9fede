"""`secateur compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli import completion, options
from secateur.cli.tables import put
from secateur.config import from_dict, read_tables
from secateur.runtime.errors import SecateurError


def compare(
    benchmark: Annotated[
        Path, typer.Argument(help="A TOML file; see docs/how_to/compare_criteria.md.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the results; resumes an earlier benchmark."),
    ] = Path("secateur-benchmark"),
    data_source: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            autocompletion=completion.data_sets,
            help="Data set (default: the file's).",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", help="Folder of the weight files, for relative paths."),
    ] = None,
    device: options.Device = None,
    settings: options.Set = None,
    workers: Annotated[
        int, typer.Option("--workers", "-j", min=1, help="Jobs to run at a time.")
    ] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed jobs again.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare criteria: prune networks by each, to each target, under one protocol.

    Finished jobs are not run again: after an interruption the same command resumes.
    Example: secateur compare benchmark.toml -o benchmark -j 2
    """
    tables = read_tables(benchmark)
    if data_source is not None:
        put(tables, "data.source", data_source)
    for key, value in options.assigned(settings or ()):
        put(tables, key, value)

    from secateur.cli import console, output
    from secateur.experiments.compare.results import row_of
    from secateur.experiments.compare.runner import run_benchmark
    from secateur.experiments.compare.spec import BenchmarkSpec
    from secateur.experiments.compare.statistics import compute_statistics
    from secateur.experiments.report.benchmark import PAGE, write_benchmark
    from secateur.experiments.report.benchmark import tables as text_tables
    from secateur.experiments.report.benchmark_summary import benchmark_verdict
    from secateur.runtime.device import find_device

    spec = from_dict(tables, BenchmarkSpec).with_weights_in(weights).on_device(device)
    for network in spec.networks:
        find_device(network.device)  # else every job would fail
    try:
        jobs = run_benchmark(
            spec,
            out,
            workers=workers,
            retry=retry,
            progress=output.progress(),
            lines=output.stage_lines(),
        )
    except KeyboardInterrupt as stop:
        stop.add_note("finished jobs are kept: the same command runs the others")
        raise
    write_benchmark(out, spec, jobs, output.command_line())
    rows = [row_of(job) for job in jobs]
    if as_json:
        print(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        statistics = compute_statistics(rows, spec.compared_with)
        output.show_benchmark(text_tables(statistics), benchmark_verdict(statistics))
        console.say(f"page: {out / PAGE}")
    if any(job.outcome == "failed" for job in jobs):
        raise SecateurError("some jobs failed: --retry runs them again")
