"""Benchmarks in worker processes: interrupted, failing, and with user criteria."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch

from fault_case import FailingDisk
from layouts import write_classes
from processes import started
from secateur.cli import app
from secateur.config import CRITERIA, from_dict
from secateur.experiments.compare.job_files import (
    CHECKPOINTS,
    JOBS,
    SPEC,
    prepare_folder,
    read_job,
    write_job,
)
from secateur.experiments.compare.runner import _record_failures, _Worker, run_benchmark
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of, read_spec
from secateur.experiments.compare.worker import run_jobs
from secateur.experiments.report.benchmark import CSV, MARKDOWN, PAGE, ROWS, write_benchmark
from secateur.models import zoo
from secateur.pipeline.inputs import load_inputs
from secateur.pipeline.prune import prune
from secateur.runtime.errors import RunFolderError, UnknownName, WriteError

VARYING = {"seconds", "latency_left"}
"""What a row says of time."""


@pytest.fixture
def content(tmp_path: Path, model_file: Path) -> dict[str, Any]:
    """Two criteria, three targets, two seeds on a few small images."""
    for part, count in (("train", 24), ("test", 8)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    return {
        "criteria": ["l1", "vote"],
        "targets": ["macs=0.8", "macs=0.7", "macs=0.5"],
        "seeds": 2,
        "networks": [{"name": f"{model_file}:small", "label": "small", "allow_untrained": True}],
        "data": {
            "source": f"folder:{tmp_path / 'images'}",
            "image_size": 16,
            "calibration_images": 20,
        },
        "finetune": {"epochs": 1, "batch_size": 8, "workers": 0, "warmup_steps": 0},
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]


def run_rows(spec: BenchmarkSpec, folder: Path, **options: Any) -> list[dict[str, Any]]:
    jobs = run_benchmark(spec, folder, **options)
    write_benchmark(folder, spec, jobs)
    return rows_of(folder)


def run_rows_here(spec: BenchmarkSpec, folder: Path) -> list[dict[str, Any]]:
    """The same in this process, without workers."""
    prepare_folder(folder, spec)
    jobs = jobs_of(spec)
    with (folder.parent / "messages").open("w") as messages:
        run_jobs(folder, [job.id for job in jobs], messages)
    results = [read_job(folder, job) for job in jobs]
    write_benchmark(folder, spec, [result for result in results if result is not None])
    return rows_of(folder)


def first_table(folder: Path) -> str:
    return (folder / MARKDOWN).read_text().partition("## Remaining size")[0]


def call_compare(file: Path, folder: Path) -> None:
    sys.argv = ["secateur", "compare", str(file), "-o", str(folder), "--json"]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        app.main()


def wait_for(folder: Path, count: int, process: BaseProcess) -> None:
    """Until so many jobs are there."""
    while len(list(folder.glob("jobs/*.json"))) < count:
        assert process.exitcode is None, "the benchmark ended before it could be killed"
        time.sleep(0.02)


def end_of(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_benchmark_that_is_killed_twice_has_the_results_of_one_that_was_not(
    content: dict[str, Any], tmp_path: Path
) -> None:
    file, killed = tmp_path / "benchmark.toml", tmp_path / "killed"
    file.write_text(tomli_w.dumps(content))
    expected = run_rows(read_spec(file), tmp_path / "whole", workers=2)
    assert len(expected) == 12
    assert all(row["outcome"] == "done" for row in expected)
    assert {row["macs_left"] < 1 for row in expected} == {True}

    process = started(call_compare, file, killed)
    wait_for(killed, 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert end_of(process) == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # they end when they find it gone
    after = {path: path.stat().st_mtime_ns for path in killed.glob("jobs/*.json")}
    assert 2 <= len(after) < 12

    process = started(call_compare, file, killed)
    wait_for(killed, 8, process)
    process.terminate()
    assert end_of(process) == 143
    assert len(list(killed.glob("jobs/*.json"))) < 12

    assert end_of(started(call_compare, file, killed)) == 0
    assert rows_of(killed) == expected
    assert first_table(killed) == first_table(tmp_path / "whole")
    for path, written in after.items():
        assert path.stat().st_mtime_ns == written, "a job was done again"
    assert not (killed / CHECKPOINTS).exists()


@pytest.mark.slow
def test_a_job_has_the_result_of_a_single_run(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not what processes import')")
    monkeypatch.chdir(tmp_path)
    content |= {"criteria": ["vote", "l1"], "targets": ["macs=0.6"], "seeds": [1]}
    spec = from_dict(content, BenchmarkSpec)
    results = run_benchmark(spec, tmp_path / "out")
    for job, result in zip(jobs_of(spec), results, strict=True):
        dataset, model = load_inputs(job.config)
        alone = prune(model, dataset, job.config).result
        assert result.result is not None
        assert result.result.plan_hash == alone.plan_hash
        assert result.result.groups == alone.groups
        for one, other in zip(result.result.stages, alone.stages, strict=True):
            assert (one.stage, one.score.metric) == (other.stage, other.score.metric)
            assert one.score.loss == pytest.approx(other.score.loss, rel=1e-5)


CRITERIA_FILE = """
from pathlib import Path

import torch


class OnKernels:
    needs = frozenset()

    def __init__(self, function):
        self.function = function

    def reset(self, taps):
        self.taps = taps

    def update(self, batch):
        pass

    def state(self):
        return ()

    def compute(self, tap):
        return self.function(self.taps[tap].incoming[0][0].flatten(1).double())


def wrong_shape():
    def score(kernels):
        if (Path(__file__).parent / "mended").exists():
            return torch.arange(len(kernels))
        return torch.zeros(3, 2)

    return OnKernels(score)


def fatal():
    import os, signal

    def die(kernels):
        print("last words", file=__import__("sys").stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    return OnKernels(die)


def buggy():
    def fail(kernels):
        raise ValueError("a bug of its author's")

    return OnKernels(fail)


def largest():
    return OnKernels(lambda kernels: kernels.abs().amax(1))


def nothing():
    return 3
"""


@pytest.mark.slow
def test_failed_jobs_are_reported_and_the_others_run(
    content: dict[str, Any], tmp_path: Path
) -> None:
    criteria = tmp_path / "criteria.py"
    criteria.write_text(CRITERIA_FILE)
    names = [f"{criteria}:{name}" for name in ("wrong_shape", "nothing", "fatal", "largest")]
    content |= {"criteria": [*names, "l1"], "targets": ["macs=0.7"], "seeds": 1}
    content["finetune"] = {"epochs": 0}
    out = tmp_path / "out"
    rows = run_rows(from_dict(content, BenchmarkSpec), out)
    by_name = {row["criterion"].rpartition(":")[2]: row for row in rows}
    outcomes = {name: row["outcome"] for name, row in by_name.items()}
    assert outcomes == {
        **dict.fromkeys(("wrong_shape", "nothing", "fatal"), "failed"),
        "largest": "done",
        "l1": "done",
    }
    assert "one finite number" in by_name["wrong_shape"]["reason"]
    assert "returned int" in by_name["nothing"]["reason"]
    assert "ended by signal 9: last words" in by_name["fatal"]["reason"]
    assert by_name["fatal"]["top1_fraction"] is None
    text = (out / MARKDOWN).read_text()
    assert "## Failed" in text
    assert "last words" in text
    assert "last words" in (out / PAGE).read_text()

    (tmp_path / "mended").touch()
    kept = run_rows(from_dict(content, BenchmarkSpec), out)
    assert kept == rows
    again = run_rows(from_dict(content, BenchmarkSpec), out, retry=True)
    done = {row["criterion"].rpartition(":")[2] for row in again if row["outcome"] == "done"}
    assert done == {"wrong_shape", "largest", "l1"}
    criteria.write_text(f"{CRITERIA_FILE}# changed")
    jobs = jobs_of(from_dict(content, BenchmarkSpec))
    same = {job.criterion for job in jobs if job.id in {row["id"] for row in again}}
    assert same == {"l1"}


def test_a_failed_job_keeps_its_checkpoints_for_a_retry(
    content: dict[str, Any], tmp_path: Path
) -> None:
    spec = from_dict(content, BenchmarkSpec)
    out = tmp_path / "out"
    job = jobs_of(spec)[0]
    checkpoints = out / CHECKPOINTS / job.id
    checkpoints.mkdir(parents=True)
    (out / JOBS).mkdir()
    result = write_job(out, job, spec, failed="no room")
    assert (result.outcome, result.reason) == ("failed", "no room")
    assert checkpoints.is_dir()


@pytest.mark.parametrize(
    ("count", "has_started_any", "given_up", "again"),
    [
        (3, True, 0, [3]),
        # Without a started job a retry would fail again, unless another criterion is the cause.
        (3, False, 3, []),
        (6, False, 0, [3, 3]),
        (6, True, 0, [6]),
    ],
)
def test_a_worker_that_dies_between_jobs_loses_as_few_as_possible(
    content: dict[str, Any],
    tmp_path: Path,
    count: int,
    has_started_any: bool,
    given_up: int,
    again: list[int],
) -> None:
    spec = from_dict(content | {"seeds": 1}, BenchmarkSpec)
    jobs = list(jobs_of(spec)[:count])
    (tmp_path / JOBS).mkdir()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], encoding="utf-8")
        process.wait()
        worker = _Worker(process, jobs, stderr, has_started_any=has_started_any)
        lost = list(_record_failures(tmp_path, spec, worker))
    assert [job.reason for job in lost] == ["its process ended with code 3"] * given_up
    groups = worker.remaining_groups()
    assert [len(group) for group in groups] == again
    for group in groups:
        assert has_started_any or len({job.criterion for job in group}) == 1


def test_an_error_of_one_criterion_does_not_affect_the_others(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "criteria.py").write_text(CRITERIA_FILE)
    content |= {"criteria": [f"{tmp_path / 'criteria.py'}:buggy", "l1"], "targets": ["macs=0.7"]}
    spec = from_dict(content | {"seeds": 1, "finetune": {"epochs": 0}}, BenchmarkSpec)
    prepare_folder(tmp_path / "out", spec)
    jobs = jobs_of(spec)
    with (tmp_path / "messages").open("w") as messages:
        run_jobs(tmp_path / "out", [job.id for job in jobs], messages)
    results = [read_job(tmp_path / "out", job) for job in jobs]
    assert [result and result.outcome for result in results] == ["failed", "done"]
    assert results[0] is not None
    assert results[0].reason == "ValueError: a bug of its author's"
    lines = [f"{event} {job.id}" for job in jobs for event in ("started", "ended")]
    assert (tmp_path / "messages").read_text().splitlines() == lines


@pytest.mark.slow
def test_a_job_records_which_network_of_a_file_it_pruned(
    content: dict[str, Any], tmp_path: Path
) -> None:
    name = content["networks"][0]["name"]
    raw, average = (dict(zoo.load(name, num_classes=2, seed=s).state_dict()) for s in (0, 1))
    torch.save({"net": raw, "net_ema": average}, tmp_path / "last.ckpt")
    content["networks"][0] |= {"weights": str(tmp_path / "last.ckpt"), "allow_untrained": True}
    changes = {"criteria": ["l1"], "targets": ["macs=0.8"], "seeds": 1}
    spec = from_dict({**content, **changes, "finetune": {"epochs": 0}}, BenchmarkSpec)
    run_rows_here(spec, tmp_path / "out")
    result = read_job(tmp_path / "out", jobs_of(spec)[0])
    assert result is not None
    assert result.result is not None
    assert "'net_ema' was loaded" in str(result.result.notes)


def test_no_checkpoint_is_kept_for_a_plan_that_may_not_come_again(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["macs=0.7", "latency=0.7"]
    content |= {"criteria": ["l1"], "targets": targets, "seeds": 1}
    spec = from_dict(content, BenchmarkSpec)
    kept: dict[str, Path | None] = {}

    def fake_prune(*_: object, checkpoints: Path | None, **__: object) -> None:
        kept[targets[len(kept)]] = checkpoints
        raise RunFolderError("enough")

    monkeypatch.setattr("secateur.experiments.compare.worker.prune", fake_prune)
    monkeypatch.setattr("secateur.experiments.compare.worker.make_baseline", lambda *_: None)
    prepare_folder(tmp_path / "out", spec)
    jobs = jobs_of(spec)
    with (tmp_path / "messages").open("w") as messages:
        run_jobs(tmp_path / "out", [job.id for job in jobs], messages)
    assert kept == {
        "macs=0.7": tmp_path / "out" / CHECKPOINTS / jobs[0].id,
        "latency=0.7": None,
    }


def test_workers_read_the_same_jobs(content: dict[str, Any], tmp_path: Path) -> None:
    """From the file in the folder, also if a value is a table."""
    shares = {"plan.allocation": "shares", "plan.shares": {"layer1.*": 0.5}}
    content["variants"] = {
        "dotted": shares,
        "nested": {"plan": {"allocation": "shares", "shares": {"layer1.*": 0.5}}},
        "none": {"score.concept_weights": {}},
    }
    content["score"] = {"concept_weights": {"colours": 2.0}}
    spec = from_dict(content, BenchmarkSpec)
    prepare_folder(tmp_path / "out", spec)
    jobs = jobs_of(read_spec(tmp_path / "out" / SPEC))
    assert jobs == jobs_of(spec)
    by_variant = {job.variant: job.config for job in jobs}
    assert by_variant["dotted"].plan == by_variant["nested"].plan
    assert by_variant["dotted"].plan.shares == {"layer1.*": 0.5}
    assert by_variant["none"].score.concept_weights == {}


def test_missing_data_fails_its_jobs_with_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    content["data"]["source"] = f"folder:{tmp_path / 'nowhere'}"
    content |= {"seeds": 1, "targets": ["macs=0.7"]}
    rows = run_rows_here(from_dict(content, BenchmarkSpec), tmp_path / "out")
    assert [row["outcome"] for row in rows] == ["failed", "failed"]
    assert all("nowhere" in row["reason"] for row in rows)


def test_a_wrong_specification_runs_nothing(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean vote"):
        run_benchmark(from_dict(content | {"criteria": ["votes"]}, BenchmarkSpec), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="holds something other"):
        run_benchmark(from_dict(content, BenchmarkSpec), tmp_path / "other")


def test_the_example_of_the_page_is_a_criterion_that_ends_up_in_the_table(
    content: dict[str, Any], tmp_path: Path
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "how_to" / "compare_criteria.md").read_text()
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in blocks] == ["peak.py", "largest.py"]
    criteria = ["vote"]
    for (name, code), factory in zip(blocks, ("Peak", "largest"), strict=True):
        path = tmp_path / name
        path.write_text(code)
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) < 15
        criteria.append(f"{path}:{factory}")
    content |= {"criteria": criteria, "targets": ["macs=0.7"], "seeds": 1}
    content["finetune"] = {"epochs": 0}
    out = tmp_path / "out"
    rows = run_rows_here(from_dict(content, BenchmarkSpec), out)
    assert [row["outcome"] for row in rows] == ["done"] * 3
    assert len({row["plan_hash"] for row in rows}) == 3
    for criterion in criteria:
        assert f"| {criterion} |" in (out / MARKDOWN).read_text()


def test_rows_come_as_csv_too(content: dict[str, Any], tmp_path: Path) -> None:
    content |= {"targets": ["macs=0.7"], "seeds": 1, "score_on": "validation"}
    rows = run_rows_here(from_dict(content, BenchmarkSpec), tmp_path / "out")
    read = list(csv.DictReader(io.StringIO((tmp_path / "out" / CSV).read_text())))
    assert len(read) == len(rows) == 2
    for one, other in zip(read, rows, strict=True):
        assert float(one["top1_fraction"]) == other["top1_fraction"]
        assert one["distilled_top1_fraction"] == ""
        assert one["criterion"] in CRITERIA
        assert one["score_on"] == "validation"
        assert int(one["images"]) == 4  # a tenth of 48, of each class alike
        assert int(one["threads"]) == 1


def test_a_folder_that_a_full_disk_left_empty_is_resumed(
    content: dict[str, Any], tmp_path: Path
) -> None:
    spec = from_dict({**content, "criteria": ["l1"], "targets": ["macs=0.8"]}, BenchmarkSpec)
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    for place in (5, 6):  # after the lock: opening and writing benchmark.toml
        with FailingDisk(tmp_path, place).mounted(), pytest.raises(WriteError):
            run_benchmark(spec, link, skip=lambda job: True)
    (out / "benchmark.toml.unfinished").touch()  # of one that was killed
    assert run_benchmark(spec, link, skip=lambda job: True) == ()
    assert (out / "benchmark.toml").is_file()
