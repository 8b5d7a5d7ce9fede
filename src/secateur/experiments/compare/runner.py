"""Works a comparison off in processes, cell by cell, so that an interruption loses one at most.

Every cell leaves a file of its own, written under another name and renamed. A process that dies
takes only the cell with it that it was at; that one is noted as failed and the rest goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import tomli_w

from secateur.config import from_dict, parse_budget, read_tables
from secateur.errors import RunFolderError, SecateurError
from secateur.experiments.compare.spec import BenchmarkSpec, Job, group_jobs, jobs_of
from secateur.pipeline.inputs import check_names, check_weights, load_inputs
from secateur.pipeline.prune import prune
from secateur.pipeline.result import RunResult
from secateur.pipeline.scoring_context import Baseline, make_baseline
from secateur.runtime.atomic_io import UNFINISHED, make_folder, make_inner_folder, replace_file
from secateur.runtime.error_messages import explain
from secateur.runtime.file_lock import lock_folder
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.schema import Record, parse_record
from secateur.runtime.signals import defer_signals

SCHEMA_VERSION = 2
COMPARISON, CELLS, CHECKPOINTS = "benchmark.toml", "cells", "checkpoints"
PATIENCE = 3.0
"""Seconds that processes get to end by themselves when the sweep is interrupted."""
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_ARENA_MAX": "1",
}
"""Settings of glibc: a process keeps the memory that it has freed, and need not have each large
feature map cleared anew. Halves the time of EfficientNet-Lite0."""


class JobRecord(Record):
    """Which cell it is, and whether it came to an end."""

    id: str
    """See `comparison.Cell`."""
    network: str
    variant: str
    criterion: str
    target: str
    seed: int
    outcome: Literal["done", "failed"]
    reason: str = ""
    """One line, where it failed."""
    score_on: Literal["test", "validation"]
    """The images that accuracies are about."""


class JobResult(JobRecord):
    """What became of a cell."""

    schema_version: int = SCHEMA_VERSION
    result: RunResult | None = None


def read_spec(path: Path) -> BenchmarkSpec:
    """The comparison in a TOML file; raises `UsageError` that names a wrong key."""
    return from_dict(read_tables(path), BenchmarkSpec)


def run_benchmark(
    comparison: BenchmarkSpec,
    folder: Path,
    *,
    workers: int = 1,
    retry: bool = False,
    skip: Callable[[Job], bool] = lambda cell: False,
    progress: ProgressCallback = no_progress,
) -> tuple[JobResult, ...]:
    """Works off what is missing in a folder, `jobs` processes at a time; all results, in order.

    `retry` tries failed cells again; those to `skip` are not looked at. Raises `RunFolderError`
    where the folder holds something else.
    """
    cells = [cell for cell in jobs_of(comparison) if not skip(cell)]
    for cell in cells:
        check_names(cell.config)
        check_weights(cell.config, allow_untrained=False)
    with lock_folder(folder):
        _prepare(folder, comparison)
        known = {cell.id: read_job(folder, cell) for cell in cells}
        missing = [
            cell
            for cell in cells
            if (found := known[cell.id]) is None or (retry and found.outcome == "failed")
        ]
        for done in progress(
            _run_jobs(folder, comparison, missing, workers), "cells", len(missing)
        ):
            known[done.id] = done
        _tidy(folder, [id for id, found in known.items() if found and found.outcome == "done"])
    return tuple(result for cell in cells if (result := known[cell.id]) is not None)


def read_job(folder: Path, cell: Job) -> JobResult | None:
    """The result of a cell, or None where there is none yet."""
    path = _path(folder, cell)
    if not path.exists():
        return None
    content = read_bounded(path, TEXT, RunFolderError)
    return parse_record(JobResult, content, SCHEMA_VERSION, str(path))


def _prepare(folder: Path, comparison: BenchmarkSpec) -> None:
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if COMPARISON not in there and any(not name.endswith(UNFINISHED) for name in there):
        raise RunFolderError(f"{folder} holds something other than a comparison: choose another")
    text = tomli_w.dumps(comparison.model_dump(mode="json", exclude_none=True, exclude_unset=True))
    make_folder(folder)
    replace_file(folder / COMPARISON, text)  # first: it says what the folder is
    make_inner_folder(folder / CELLS)


def _tidy(folder: Path, ended: Iterable[str]) -> None:
    """Removes the checkpoints of cells that have ended; a process may be killed before it does."""
    for id in ended:
        shutil.rmtree(folder / CHECKPOINTS / id, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / CHECKPOINTS).rmdir()  # where others are at work it is not empty


def _path(folder: Path, cell: Job) -> Path:
    return folder / CELLS / f"{cell.id}.json"


# --- the processes -----------------------------------------------------------------------------


@dataclass(eq=False)
class _Process:
    """A process at work on cells of one unit."""

    popen: subprocess.Popen[str]
    left: list[Job]
    """Cells that it has not ended."""
    errors: IO[str]
    started: str | None = None
    """The id of the cell that it is at."""
    has_begun_any: bool = False
    """Whether it came to a cell; if not, what was done for all criteria at once ended it."""

    def again(self) -> list[list[Job]]:
        """Lists of the cells that are left: a criterion each, where any may have ended it."""
        if self.has_begun_any:
            return [self.left] if self.left else []
        names = dict.fromkeys(cell.criterion for cell in self.left)
        return [[cell for cell in self.left if cell.criterion == name] for name in names]

    def close(self) -> None:
        """Lets go of its files; it has ended."""
        for file in (self.popen.stdin, self.popen.stdout, self.errors):
            if file is not None:
                file.close()


def _run_jobs(
    folder: Path, comparison: BenchmarkSpec, missing: Sequence[Job], jobs: int
) -> Iterator[JobResult]:
    """The results of the missing cells as they come."""
    waiting = group_jobs(missing, jobs)
    told: queue.SimpleQueue[tuple[_Process, str | None]] = queue.SimpleQueue()
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(folder, comparison, waiting.pop(0), told))
            process, line = told.get()
            if line is not None:
                done = _note(folder, process, line)
                if done is not None:
                    yield done
                continue
            running.remove(process)
            yield from _bury(folder, comparison, process)
            waiting[:0] = process.again()
    finally:
        _end(running)


def _start(
    folder: Path,
    comparison: BenchmarkSpec,
    cells: list[Job],
    told: queue.SimpleQueue[tuple[_Process, str | None]],
) -> _Process:
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    environment = {**KEPT_MEMORY, **os.environ, "OMP_NUM_THREADS": str(comparison.threads)}
    popen = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "secateur.experiments.compare.worker",
        ],  # nothing of the current folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # an interrupt is for this process, which ends the others
    )
    process = _Process(popen, list(cells), errors)
    assert popen.stdin is not None
    order = {"folder": str(folder), "cells": [cell.id for cell in cells]}
    popen.stdin.write(json.dumps(order) + "\n")
    popen.stdin.flush()  # it stays open: its end tells the process that this one has gone

    def listen() -> None:
        assert popen.stdout is not None
        for line in popen.stdout:
            told.put((process, line))
        popen.wait()
        told.put((process, None))

    threading.Thread(target=listen, daemon=True).start()
    return process


def _note(folder: Path, process: _Process, line: str) -> JobResult | None:
    """Takes in that a cell has begun, or the result of one that has ended."""
    event, _, number = line.strip().partition(" ")
    process.has_begun_any = True
    if event == "begun":
        process.started = number
    elif event == "ended":
        process.started = None
        cell = next(cell for cell in process.left if cell.id == number)
        process.left.remove(cell)
        return read_job(folder, cell)
    return None


def _bury(folder: Path, comparison: BenchmarkSpec, process: _Process) -> Iterator[JobResult]:
    """Notes what a process that has ended has left undone."""
    process.errors.seek(0)
    words = [line.strip() for line in process.errors if line.strip()]
    process.close()
    if not process.left:
        return
    code = process.popen.returncode
    how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    reason = f"its process {how}{f': {words[-1]}' if words else ''}"
    is_to_blame = not process.has_begun_any and len(process.again()) == 1  # one criterion
    lost = [cell for cell in process.left if is_to_blame or cell.id == process.started]
    for cell in lost:
        process.left.remove(cell)
        yield write_job(folder, cell, comparison, failed=reason)


def _end(running: Sequence[_Process]) -> None:
    """Asks processes to end, and makes those end that have not after a while."""
    until = time.monotonic() + PATIENCE
    with defer_signals():
        for process in running:
            process.popen.terminate()
        for process in running:
            try:
                process.popen.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            process.close()


# --- a cell ------------------------------------------------------------------------------------


def write_job(
    folder: Path,
    cell: Job,
    comparison: BenchmarkSpec,
    *,
    result: RunResult | None = None,
    failed: str = "",
) -> JobResult:
    """Leaves the result of a cell, or why there is none."""
    facts = dataclasses.asdict(cell)
    del facts["config"]
    found = JobResult(
        **facts,
        outcome="done" if result is not None else "failed",
        reason=" ".join(failed.split()),
        score_on=comparison.score_on,
        result=result,
    )
    replace_file(_path(folder, cell), found.model_dump_json() + "\n")
    if result is not None:  # where it failed, `retry` goes on from them
        _tidy(folder, [cell.id])
    return found


def work(folder: Path, ids: Sequence[str], say: IO[str]) -> None:
    """Works off cells of one unit, as a process of a sweep; says which one begins and ends."""
    comparison = read_spec(folder / COMPARISON)
    cells = [cell for cell in jobs_of(comparison) if cell.id in ids]
    # Times of layers are measured where the target of the start is one of latency.
    first = min(cells, key=lambda cell: parse_budget(cell.target).quantity != "latency").config
    try:
        dataset, model = load_inputs(first)
    except SecateurError as error:
        for cell in cells:
            write_job(folder, cell, comparison, failed=str(error))
            print(f"ended {cell.id}", file=say, flush=True)
        return
    if comparison.score_on == "validation":
        dataset = dataclasses.replace(dataset, test=dataset.validation)
    names = tuple(dict.fromkeys(cell.criterion for cell in cells))
    baseline: Baseline | None = None
    with contextlib.suppress(Exception):  # then each cell by itself shows whose fault it is
        baseline = make_baseline(model, dataset, first, names)
    for cell in cells:
        print(f"begun {cell.id}", file=say, flush=True)
        result, failed = None, ""
        try:
            # Layers timed anew may make another plan, for which no checkpoint is of use.
            is_timed = parse_budget(cell.target).quantity == "latency"
            checkpoints = None if is_timed else folder / CHECKPOINTS / cell.id
            pruned = prune(model, dataset, cell.config, baseline=baseline, checkpoints=checkpoints)
            result = pruned.result
        except SecateurError as error:
            failed = str(error)
        except Exception as error:  # whatever it is, the other cells go on
            failed = explain(error) or f"{type(error).__name__}: {error}"
        write_job(folder, cell, comparison, result=result, failed=failed)
        print(f"ended {cell.id}", file=say, flush=True)
