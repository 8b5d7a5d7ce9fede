"""The folder of a benchmark: its specification, one file for each job, and checkpoints.

A job's file is written atomically when the job ends, so an interruption loses only the jobs that
are running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import tomli_w

from secateur.experiments.compare.job import SCHEMA_VERSION, Job, JobResult
from secateur.experiments.compare.spec import BenchmarkSpec
from secateur.pipeline.result import RunResult
from secateur.runtime.atomic_io import UNFINISHED, make_folder, make_inner_folder, replace_file
from secateur.runtime.errors import RunFolderError
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import parse_record

SPEC, JOBS, CHECKPOINTS = "benchmark.toml", "jobs", "checkpoints"


def prepare_folder(folder: Path, spec: BenchmarkSpec) -> None:
    """Make a folder for a benchmark, or take the one that is there.

    Raises:
        RunFolderError: The folder holds something else.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if SPEC not in names and any(not name.endswith(UNFINISHED) for name in names):
        raise RunFolderError(f"{folder} holds something other than a benchmark: choose another")
    text = tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True, exclude_unset=True))
    make_folder(folder)
    replace_file(folder / SPEC, text)  # first, because it marks the folder as a benchmark's
    make_inner_folder(folder / JOBS)


def read_job(folder: Path, job: Job) -> JobResult | None:
    """Return the result of a job, or None if it has none yet."""
    path = _path(folder, job)
    if not path.exists():
        return None
    content = read_bounded(path, TEXT, RunFolderError)
    return parse_record(JobResult, content, SCHEMA_VERSION, str(path))


def write_job(
    folder: Path,
    job: Job,
    spec: BenchmarkSpec,
    *,
    result: RunResult | None = None,
    failed: str = "",
) -> JobResult:
    """Write and return the result of a job; without `result`, `failed` says why there is none."""
    fields = dataclasses.asdict(job)
    del fields["config"]
    job_result = JobResult(
        **fields,
        outcome="done" if result is not None else "failed",
        reason=" ".join(failed.split()),
        score_on=spec.score_on,
        result=result,
    )
    replace_file(_path(folder, job), job_result.model_dump_json() + "\n")
    if result is not None:  # a failed job that is tried again resumes from its checkpoints
        remove_checkpoints(folder, [job.id])
    return job_result


def remove_checkpoints(folder: Path, ids: Iterable[str]) -> None:
    """Remove the checkpoints of finished jobs."""
    for id in ids:
        shutil.rmtree(folder / CHECKPOINTS / id, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / CHECKPOINTS).rmdir()  # not empty while other jobs train


def _path(folder: Path, job: Job) -> Path:
    return folder / JOBS / f"{job.id}.json"
