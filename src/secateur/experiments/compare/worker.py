"""A worker process of a benchmark: `python -m secateur.experiments.compare.worker`.

It reads its order from stdin, and ends when stdin closes, which means that the runner has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from secateur.config import parse_budget
from secateur.experiments.compare.job import Job
from secateur.experiments.compare.job_files import CHECKPOINTS, SPEC, write_job
from secateur.experiments.compare.spec import jobs_of, read_spec
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune
from secateur.pipeline.scoring_context import Baseline, make_baseline
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import SecateurError
from secateur.runtime.kept_memory import kept_memory
from secateur.runtime.signals import exit_code, repeat_signals


def main() -> None:
    """Carry out an order; a request to terminate ends the process with code 143."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    messages, sys.stdout = sys.stdout, sys.stderr  # libraries' output must not mix with messages
    try:
        with repeat_signals(), kept_memory():
            run_jobs(Path(order["folder"]), order["jobs"], messages)
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


def run_jobs(folder: Path, ids: Sequence[str], messages: IO[str]) -> None:
    """Run jobs of one scoring pass; write `started ID` and `ended ID` to `messages`."""
    spec = read_spec(folder / SPEC)
    jobs = [job for job in jobs_of(spec) if job.id in ids]
    # Layers are timed only if the first job's target is one of latency.
    first = min(jobs, key=lambda job: not _is_timed(job)).config
    try:
        dataset, model = load_inputs(first)
    except SecateurError as error:
        for job in jobs:
            write_job(folder, job, spec, failed=str(error))
            print(f"ended {job.id}", file=messages, flush=True)
        return
    if spec.score_on == "validation":
        dataset = dataclasses.replace(dataset, test=dataset.validation)
    criteria = tuple(dict.fromkeys(job.criterion for job in jobs))
    baseline: Baseline | None = None
    with contextlib.suppress(Exception):  # without it, each job shows which criterion fails
        baseline = make_baseline(model, dataset, first, criteria)
    for job in jobs:
        print(f"started {job.id}", file=messages, flush=True)
        result, failed = None, ""
        try:
            # Layers that are timed again may lead to another plan, which no checkpoint fits.
            checkpoints = None if _is_timed(job) else folder / CHECKPOINTS / job.id
            pruned = prune(model, dataset, job.config, baseline=baseline, checkpoints=checkpoints)
            result = pruned.result
        except SecateurError as error:
            failed = str(error)
        except Exception as error:  # the other jobs still run
            failed = explain(error) or f"{type(error).__name__}: {error}"
        write_job(folder, job, spec, result=result, failed=failed)
        print(f"ended {job.id}", file=messages, flush=True)


def _is_timed(job: Job) -> bool:
    return parse_budget(job.target).quantity == "latency"


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # at the interpreter's own end a process that has used OpenVINO may wait for ever
