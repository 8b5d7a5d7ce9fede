"""Comparisons in processes: interrupted, failing, with criteria of one's own."""

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

import pytest
import tomli_w

from fault_case import FailingDisk
from layouts import write_classes
from processes import started
from secateur.cli import app
from secateur.config import CRITERIA, from_dict
from secateur.errors import RunFolderError, UnknownName, WriteError
from secateur.experiments.compare.runner import (
    CELLS,
    CHECKPOINTS,
    COMPARISON,
    _bury,
    _prepare,
    _Process,
    read_job,
    read_spec,
    run_benchmark,
    work,
    write_job,
)
from secateur.experiments.compare.spec import BenchmarkSpec, jobs_of
from secateur.experiments.report.comparison import CSV, MARKDOWN, PAGE, ROWS, write_comparison
from secateur.pipeline import prune as pipeline
from secateur.pipeline.inputs import load_inputs

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
        "networks": [{"name": f"{model_file}:small", "label": "small"}],
        "data": {
            "source": f"folder:{tmp_path / 'images'}",
            "image_size": 16,
            "calibration_images": 20,
        },
        "finetune": {"epochs": 1, "batch_size": 8, "workers": 0, "warmup_steps": 0},
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows without what differs from run to run."""
    found = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in VARYING} for row in found]


def swept(comparison: BenchmarkSpec, folder: Path, **options: Any) -> list[dict[str, Any]]:
    cells = run_benchmark(comparison, folder, **options)
    write_comparison(folder, comparison, cells)
    return rows_of(folder)


def worked(comparison: BenchmarkSpec, folder: Path) -> list[dict[str, Any]]:
    """The same in this process, without one that works for it."""
    _prepare(folder, comparison)
    cells = jobs_of(comparison)
    with (folder.parent / "said").open("w") as say:
        work(folder, [cell.id for cell in cells], say)
    results = [read_job(folder, cell) for cell in cells]
    write_comparison(folder, comparison, [result for result in results if result is not None])
    return rows_of(folder)


def first_table(folder: Path) -> str:
    return (folder / MARKDOWN).read_text().partition("## What is left")[0]


def call_compare(file: Path, folder: Path) -> None:
    sys.argv = ["secateur", "compare", str(file), "-o", str(folder), "--json"]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        app.main()


def wait_for(folder: Path, count: int, process: BaseProcess) -> None:
    """Until so many cells are there."""
    while len(list(folder.glob("cells/*.json"))) < count:
        assert process.exitcode is None, "the sweep ended before it could be killed"
        time.sleep(0.02)


def end_of(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_as_one_that_was_left_alone(
    content: dict[str, Any], tmp_path: Path
) -> None:
    file, killed = tmp_path / "benchmark.toml", tmp_path / "killed"
    file.write_text(tomli_w.dumps(content))
    expected = swept(read_spec(file), tmp_path / "whole", jobs=2)
    assert len(expected) == 12
    assert all(row["outcome"] == "done" for row in expected)
    assert {row["macs_left"] < 1 for row in expected} == {True}

    process = started(call_compare, file, killed)
    wait_for(killed, 2, process)
    process.kill()
    assert end_of(process) == -signal.SIGKILL
    time.sleep(1)  # the processes that worked for it end when they find it gone
    after = {path: path.stat().st_mtime_ns for path in killed.glob("cells/*.json")}
    assert 2 <= len(after) < 12

    process = started(call_compare, file, killed)
    wait_for(killed, 8, process)
    process.terminate()
    assert end_of(process) == 130
    assert len(list(killed.glob("cells/*.json"))) < 12

    assert end_of(started(call_compare, file, killed)) == 0
    assert rows_of(killed) == expected
    assert first_table(killed) == first_table(tmp_path / "whole")
    for path, written in after.items():
        assert path.stat().st_mtime_ns == written, "a cell was done again"
    assert not (killed / CHECKPOINTS).exists()


def test_a_cell_is_what_a_run_of_its_own_finds(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not what processes import')")
    monkeypatch.chdir(tmp_path)
    content |= {"criteria": ["vote", "l1"], "targets": ["macs=0.6"], "seeds": [1]}
    comparison = from_dict(content, BenchmarkSpec)
    found = run_benchmark(comparison, tmp_path / "out")
    for cell, result in zip(jobs_of(comparison), found, strict=True):
        dataset, model = load_inputs(cell.config)
        alone = pipeline.prune(model, dataset, cell.config).result
        assert result.result is not None
        assert result.result.plan_hash == alone.plan_hash
        assert result.result.groups == alone.groups
        for one, other in zip(result.result.stages, alone.stages, strict=True):
            assert (one.stage, one.score.top1_fraction) == (other.stage, other.score.top1_fraction)
            assert one.score.loss == pytest.approx(other.score.loss, rel=1e-5)


BROKEN = """
from pathlib import Path

import torch
from secateur.criteria.kernels import OfKernels


class wrong_shape(OfKernels):
    def __init__(self):
        super().__init__(torch.numel)

    def compute(self, part):
        if (Path(__file__).parent / "mended").exists():
            return torch.arange(self._parts[part].filters)
        return torch.zeros(3, 2)


def fatal():
    import os, signal

    def die(kernels):
        print("last words", file=__import__("sys").stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    return OfKernels(die)


def largest():
    return OfKernels(lambda kernels: kernels.flatten(1).abs().amax(1))


def nothing():
    return 3
"""


def test_failing_cells_are_reported_and_the_rest_goes_on(
    content: dict[str, Any], tmp_path: Path
) -> None:
    own = tmp_path / "criteria.py"
    own.write_text(BROKEN)
    names = [f"{own}:{name}" for name in ("wrong_shape", "nothing", "fatal", "largest")]
    content |= {"criteria": [*names, "l1"], "targets": ["macs=0.7"], "seeds": 1}
    content["finetune"] = {"epochs": 0}
    out = tmp_path / "out"
    rows = swept(from_dict(content, BenchmarkSpec), out)
    by_name = {row["criterion"].rpartition(":")[2]: row for row in rows}
    outcomes = {name: row["outcome"] for name, row in by_name.items()}
    assert outcomes == {
        **dict.fromkeys(("wrong_shape", "nothing", "fatal"), "failed"),
        "largest": "done",
        "l1": "done",
    }
    assert "one finite number" in by_name["wrong_shape"]["reason"]
    assert "returned int, no criterion" in by_name["nothing"]["reason"]
    assert "ended by signal 9: last words" in by_name["fatal"]["reason"]
    assert by_name["fatal"]["top1_fraction"] is None
    text = (out / MARKDOWN).read_text()
    assert "## Failed" in text
    assert "last words" in text
    assert "last words" in (out / PAGE).read_text()

    (tmp_path / "mended").touch()
    kept = swept(from_dict(content, BenchmarkSpec), out)
    assert kept == rows
    again = swept(from_dict(content, BenchmarkSpec), out, retry=True)
    done = {row["criterion"].rpartition(":")[2] for row in again if row["outcome"] == "done"}
    assert done == {"wrong_shape", "largest", "l1"}
    own.write_text(f"{BROKEN}# changed")
    jobs = jobs_of(from_dict(content, BenchmarkSpec))
    same = {job.criterion for job in jobs if job.id in {row["id"] for row in again}}
    assert same == {"l1"}


def test_a_cell_that_fails_leaves_its_checkpoints_for_another_try(
    content: dict[str, Any], tmp_path: Path
) -> None:
    comparison = from_dict(content, BenchmarkSpec)
    out = tmp_path / "out"
    cell = jobs_of(comparison)[0]
    checkpoints = out / CHECKPOINTS / cell.id
    checkpoints.mkdir(parents=True)
    (out / CELLS).mkdir()
    found = write_job(out, cell, comparison, failed="no room")
    assert (found.outcome, found.reason) == ("failed", "no room")
    assert checkpoints.is_dir()


@pytest.mark.parametrize(
    ("count", "has_begun_any", "given_up", "again"),
    [
        (3, True, 0, [3]),
        # One that came to no cell would come to none again, unless other criteria are to blame.
        (3, False, 3, []),
        (6, False, 0, [3, 3]),
        (6, True, 0, [6]),
    ],
)
def test_a_process_that_dies_between_cells_takes_as_few_with_it_as_can_be(
    content: dict[str, Any],
    tmp_path: Path,
    count: int,
    has_begun_any: bool,
    given_up: int,
    again: list[int],
) -> None:
    comparison = from_dict(content | {"seeds": 1}, BenchmarkSpec)
    cells = list(jobs_of(comparison)[:count])
    (tmp_path / CELLS).mkdir()
    with tempfile.TemporaryFile("w+") as errors:
        popen = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], encoding="utf-8")
        popen.wait()
        process = _Process(popen, cells, errors, has_begun_any=has_begun_any)
        lost = list(_bury(tmp_path, comparison, process))
    assert [cell.reason for cell in lost] == ["its process ended with code 3"] * given_up
    lists = process.again()
    assert [len(each) for each in lists] == again
    for each in lists:
        assert has_begun_any or len({cell.criterion for cell in each}) == 1


BROKEN_WHILE_SEEING = """
from secateur.criteria.kernels import OfKernels


class broken(OfKernels):
    def __init__(self):
        super().__init__(len)

    def compute(self, part):
        raise ValueError("a bug of its author's")
"""


def test_an_error_of_one_criterion_is_none_of_the_others(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "criteria.py").write_text(BROKEN_WHILE_SEEING)
    content |= {"criteria": [f"{tmp_path / 'criteria.py'}:broken", "l1"], "targets": ["macs=0.7"]}
    comparison = from_dict(content | {"seeds": 1, "finetune": {"epochs": 0}}, BenchmarkSpec)
    _prepare(tmp_path / "out", comparison)
    cells = jobs_of(comparison)
    with (tmp_path / "said").open("w") as say:
        work(tmp_path / "out", [cell.id for cell in cells], say)
    found = [read_job(tmp_path / "out", cell) for cell in cells]
    assert [each and each.outcome for each in found] == ["failed", "done"]
    assert found[0] is not None
    assert found[0].reason == "ValueError: a bug of its author's"
    words = [f"{event} {cell.id}" for cell in cells for event in ("begun", "ended")]
    assert (tmp_path / "said").read_text().splitlines() == words


def test_no_checkpoint_is_kept_for_a_plan_that_may_not_come_again(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["macs=0.7", "latency=0.7"]
    content |= {"criteria": ["l1"], "targets": targets, "seeds": 1}
    comparison = from_dict(content, BenchmarkSpec)
    kept: dict[str, Path | None] = {}

    def prune(*_: object, checkpoints: Path | None, **__: object) -> None:
        kept[targets[len(kept)]] = checkpoints
        raise RunFolderError("enough")

    monkeypatch.setattr(pipeline, "prune", prune)
    monkeypatch.setattr(pipeline, "make_start", lambda *_: None)
    _prepare(tmp_path / "out", comparison)
    cells = jobs_of(comparison)
    with (tmp_path / "said").open("w") as say:
        work(tmp_path / "out", [cell.id for cell in cells], say)
    assert kept == {
        "macs=0.7": tmp_path / "out" / CHECKPOINTS / cells[0].id,
        "latency=0.7": None,
    }


def test_cells_are_the_same_to_the_processes_that_work_them_off(
    content: dict[str, Any], tmp_path: Path
) -> None:
    """They read the comparison as the folder holds it; also where a value is a table."""
    shares = {"plan.allocation": "shares", "plan.shares": {"layer1.*": 0.5}}
    content["variants"] = {
        "dotted": shares,
        "nested": {"plan": {"allocation": "shares", "shares": {"layer1.*": 0.5}}},
        "none": {"score.concept_weights": {}},
    }
    content["score"] = {"concept_weights": {"colours": 2.0}}
    comparison = from_dict(content, BenchmarkSpec)
    _prepare(tmp_path / "out", comparison)
    cells = jobs_of(read_spec(tmp_path / "out" / COMPARISON))
    assert cells == jobs_of(comparison)
    by_variant = {cell.variant: cell.config for cell in cells}
    assert by_variant["dotted"].plan == by_variant["nested"].plan
    assert by_variant["dotted"].plan.shares == {"layer1.*": 0.5}
    assert by_variant["none"].score.concept_weights == {}


def test_data_that_is_not_there_fails_its_cells_in_one_line(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["data"]["source"] = f"folder:{tmp_path / 'nowhere'}"
    content |= {"seeds": 1, "targets": ["macs=0.7"]}
    rows = worked(from_dict(content, BenchmarkSpec), tmp_path / "out")
    assert [row["outcome"] for row in rows] == ["failed", "failed"]
    assert all("nowhere" in row["reason"] for row in rows)


def test_what_is_wrong_from_the_start_stops_all(content: dict[str, Any], tmp_path: Path) -> None:
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
    rows = worked(from_dict(content, BenchmarkSpec), out)
    assert [row["outcome"] for row in rows] == ["done"] * 3
    assert len({row["plan_hash"] for row in rows}) == 3
    for criterion in criteria:
        assert f"| {criterion} |" in (out / MARKDOWN).read_text()


def test_rows_come_as_csv_too(content: dict[str, Any], tmp_path: Path) -> None:
    content |= {"targets": ["macs=0.7"], "seeds": 1, "score_on": "validation"}
    rows = worked(from_dict(content, BenchmarkSpec), tmp_path / "out")
    read = list(csv.DictReader(io.StringIO((tmp_path / "out" / CSV).read_text())))
    assert len(read) == len(rows) == 2
    for one, other in zip(read, rows, strict=True):
        assert float(one["top1_fraction"]) == other["top1_fraction"]
        assert one["distilled_top1_fraction"] == ""
        assert one["criterion"] in CRITERIA
        assert one["score_on"] == "validation"
        assert int(one["images"]) == 4  # a tenth of 48, of each class alike
        assert int(one["threads"]) == 1


def test_a_folder_that_a_full_disk_has_left_empty_is_gone_on_with(
    content: dict[str, Any], tmp_path: Path
) -> None:
    comparison = from_dict({**content, "criteria": ["l1"], "targets": ["macs=0.8"]}, BenchmarkSpec)
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    for place in (5, 6):  # after the lock: opening and writing benchmark.toml
        with FailingDisk(tmp_path, place).mounted(), pytest.raises(WriteError):
            run_benchmark(comparison, link, skip=lambda cell: True)
    (out / "benchmark.toml.unfinished").touch()  # of one that was killed
    assert run_benchmark(comparison, link, skip=lambda cell: True) == ()
    assert (out / "benchmark.toml").is_file()
