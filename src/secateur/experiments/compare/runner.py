"""Run the jobs of a benchmark in worker processes, and resume after an interruption.

A worker that dies takes only its current job with it: that job is recorded as failed, and another
worker takes over the remaining ones.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from secateur.experiments.compare.job import Job, JobResult
from secateur.experiments.compare.job_files import (
    prepare_folder,
    read_job,
    remove_checkpoints,
    write_job,
)
from secateur.experiments.compare.spec import BenchmarkSpec, group_jobs, jobs_of
from secateur.pipeline.inputs import check_names, check_weights
from secateur.runtime.file_lock import lock_folder
from secateur.runtime.progress import ProgressCallback, StageLines, no_progress
from secateur.runtime.signals import defer_signals

GRACE_SECONDS = 3.0
"""Time for workers to end by themselves when the benchmark is interrupted."""


def run_benchmark(
    spec: BenchmarkSpec,
    folder: Path,
    *,
    workers: int = 1,
    retry: bool = False,
    skip: Callable[[Job], bool] = lambda job: False,
    progress: ProgressCallback = no_progress,
    lines: StageLines | None = None,
) -> tuple[JobResult, ...]:
    """Run the jobs that have no result in the folder yet, and return all results, in order.

    Args:
        spec: The benchmark.
        folder: Where results are written, one file a job.
        workers: Number of processes at a time.
        retry: Run failed jobs again.
        skip: Says of a job whether to leave it out altogether.
        progress: Shows how many jobs have ended.
        lines: Gets a line when a job has ended.

    Raises:
        RunFolderError: The folder holds something else, or another run works in it.
    """
    lines = lines or StageLines()
    jobs = [job for job in jobs_of(spec) if not skip(job)]
    for job in jobs:
        check_names(job.config)
        check_weights(job.config)
    with lock_folder(folder):
        prepare_folder(folder, spec)
        results = {job.id: read_job(folder, job) for job in jobs}
        pending = [
            job
            for job in jobs
            if (result := results[job.id]) is None or (retry and result.outcome == "failed")
        ]
        new_results = _run_jobs(folder, spec, pending, workers)
        shown_results = progress(new_results, "jobs", len(pending))
        for number, result in enumerate(shown_results, 1):
            results[result.id] = result
            lines.end_step("job", number, len(pending), f"{result.id} {result.outcome}")
        # A worker may be killed before it removes them.
        done = [id for id, result in results.items() if result and result.outcome == "done"]
        remove_checkpoints(folder, done)
    return tuple(result for job in jobs if (result := results[job.id]) is not None)


@dataclass(eq=False)
class _Worker:
    """A process that runs jobs of one scoring pass."""

    process: subprocess.Popen[str]
    pending: list[Job]
    """Jobs that have not ended."""
    stderr: IO[str]
    current: str | None = None
    """The id of the job that is running."""
    has_started_any: bool = False
    """Whether any job started. If none did, the process died while it prepared all of them."""

    def remaining_groups(self) -> list[list[Job]]:
        """Return groups of pending jobs for new workers.

        If no job started, any criterion may be the cause, so each gets a worker of its own.
        """
        if self.has_started_any:
            return [self.pending] if self.pending else []
        names = dict.fromkeys(job.criterion for job in self.pending)
        return [[job for job in self.pending if job.criterion == name] for name in names]

    def close(self) -> None:
        """Close the files of a process that has ended."""
        for file in (self.process.stdin, self.process.stdout, self.stderr):
            if file is not None:
                file.close()


Messages = queue.SimpleQueue[tuple[_Worker, str | None]]
"""Lines that workers print, and None when one has ended."""


def _run_jobs(
    folder: Path, spec: BenchmarkSpec, pending: Sequence[Job], workers: int
) -> Iterator[JobResult]:
    """Run jobs and yield their results as they come."""
    waiting = group_jobs(pending, workers)
    messages: Messages = queue.SimpleQueue()
    running: list[_Worker] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start_worker(folder, spec, waiting.pop(0), messages))
            worker, line = messages.get()
            if line is not None:
                result = _handle_message(folder, worker, line)
                if result is not None:
                    yield result
                continue
            running.remove(worker)
            yield from _record_failures(folder, spec, worker)
            waiting[:0] = worker.remaining_groups()
    finally:
        _stop(running)


def _start_worker(
    folder: Path, spec: BenchmarkSpec, jobs: list[Job], messages: Messages
) -> _Worker:
    stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
    module = "secateur.experiments.compare.worker"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module],  # -P: imports nothing from the current folder
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": str(spec.threads)},
        start_new_session=True,  # an interrupt reaches this process, which stops the workers
    )
    worker = _Worker(process, list(jobs), stderr)
    assert process.stdin is not None
    order = {"folder": str(folder), "jobs": [job.id for job in jobs]}
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()  # stays open: the worker ends when it closes

    def forward_messages() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            messages.put((worker, line))
        process.wait()
        messages.put((worker, None))

    threading.Thread(target=forward_messages, daemon=True).start()
    return worker


def _handle_message(folder: Path, worker: _Worker, line: str) -> JobResult | None:
    """Note that a job has started, or return the result of one that has ended."""
    event, _, id = line.strip().partition(" ")
    worker.has_started_any = True
    if event == "started":
        worker.current = id
    elif event == "ended":
        worker.current = None
        job = next(job for job in worker.pending if job.id == id)
        worker.pending.remove(job)
        return read_job(folder, job)
    return None


def _record_failures(folder: Path, spec: BenchmarkSpec, worker: _Worker) -> Iterator[JobResult]:
    """Record the jobs that a process took with it when it died."""
    worker.stderr.seek(0)
    lines = [line.strip() for line in worker.stderr if line.strip()]
    worker.close()
    if not worker.pending:
        return
    code = worker.process.returncode
    cause = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    reason = f"its process {cause}{f': {lines[-1]}' if lines else ''}"
    is_single_criterion = not worker.has_started_any and len(worker.remaining_groups()) == 1
    lost = [job for job in worker.pending if is_single_criterion or job.id == worker.current]
    for job in lost:
        worker.pending.remove(job)
        yield write_job(folder, job, spec, failed=reason)


def _stop(workers: Sequence[_Worker]) -> None:
    """Terminate workers, and kill those that are still running after a while."""
    deadline = time.monotonic() + GRACE_SECONDS
    with defer_signals():
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.close()
