"""A whole run over several processes equals that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from networks import Chain
from processes import in_group
from runs import small_config
from secateur.config import RunConfig
from secateur.data import TensorImages, batches
from secateur.data.preprocessing import Preprocessing
from secateur.experiments.run import run
from secateur.models.evaluate import evaluate
from secateur.pipeline.result import read_result
from secateur.runtime import distributed
from secateur.runtime.errors import DataError

SMALL = Preprocessing(8, 8)


def run_in_folder(config: dict[str, Any], folder: Path) -> Tensor:
    torch.manual_seed(
        distributed.rank_and_world_size()[0]
    )  # processes must not depend on what they draw
    result = run(RunConfig.model_validate(config), folder)
    return torch.tensor([stage.score.loss for stage in result.stages], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_scores_and_plan_are_those_of_one_process(
    model_file: Path, tmp_path: Path, size: int
) -> None:
    sections = {"distill": {"epochs": 1}} if size == 2 else {}
    config = small_config(model_file, **sections).model_dump(mode="json", exclude_none=True)
    alone, together = tmp_path / "alone", tmp_path / "together"
    run_in_folder(config, alone)
    losses = in_group(run_in_folder, size, config, together)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    one, other = read_result(alone), read_result(together)
    assert (alone / "plan.json").read_bytes() == (together / "plan.json").read_bytes()
    assert [group.scores for group in one.groups] == [group.scores for group in other.groups]
    for before, after in zip(one.stages[:2], other.stages[:2], strict=True):
        assert before.score.loss == after.score.loss
        assert before.score.metric == after.score.metric
        assert before.score.images == after.score.images
    expected = load_file(alone / "model.safetensors")
    for name, tensor in load_file(together / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=5e-4)


def test_a_run_that_is_fine_tuned_by_two_writes_one_folder(
    model_file: Path, tmp_path: Path
) -> None:
    training = {"epochs": 2, "batch_size": 64, "warmup_steps": 0, "flip": False}
    config = small_config(model_file, finetune=training).model_dump(mode="json", exclude_none=True)
    folder = tmp_path / "runs" / "run"
    in_group(run_in_folder, 2, config, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert not (folder / "checkpoints").exists()
    events = [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert (events.count("start"), events.count("epoch"), events.count("end")) == (1, 2, 1)


def score_of(count: int, size: int) -> Tensor:
    torch.manual_seed(0)
    model, generator = Chain(), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator).to(torch.uint8)
    images = TensorImages(pixels, torch.arange(count) % 5)
    chunks = distributed.shard(torch.arange(count).split(size))
    try:
        score = evaluate(
            model, (batch for chunk in chunks for batch in batches(images.take(chunk), size, SMALL))
        )
    except DataError:
        return torch.full((4,), -1.0, dtype=torch.float64)
    assert score.top5_fraction is None  # of five classes
    values = (score.images, score.macs, score.metric, score.loss)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("count", "size"), [(23, 4), (2, 1), (0, 4)])
def test_every_image_is_scored_once(count: int, size: int) -> None:
    expected = score_of(count, size)
    assert expected[0] == (count or -1)
    for values in in_group(score_of, 3, count, size):
        assert torch.equal(values, expected)


def shares() -> Tensor:
    rank, size = distributed.rank_and_world_size()
    shard = distributed.shard(list(range(7)))
    assert distributed.gather_shards(shard) == list(range(7))
    assert distributed.on_main_process(lambda: rank) == 0
    assert distributed.any_process(rank == size - 1)
    assert distributed.sum_over_processes([float(rank), 1.0]) == [sum(range(size)), size]
    tensor = torch.tensor([rank])
    distributed.broadcast([tensor])
    assert int(tensor) == 0
    assert distributed.is_main_process() == (rank == 0)
    return torch.tensor(shard)


def test_a_sharded_list_is_gathered_in_order() -> None:
    assert [share.tolist() for share in in_group(shares, 3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert shares().tolist() == list(range(7))


COMMAND_LINE = ("-m", "secateur")


def torchrun(
    *arguments: object, program: Sequence[str] = COMMAND_LINE
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = ["--nproc-per-node=2", "--no-python", sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(
        [*command, *two, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


MAIN_PROCESS_ENDS_LATE = """
import sys, time
from secateur.runtime.distributed import is_main_process, process_group

with process_group():
    if is_main_process():
        time.sleep(2)
        print("done")
    sys.exit(0)
"""


@pytest.mark.slow
def test_other_processes_may_end_before_the_main_process() -> None:
    done = torchrun(program=("-c", MAIN_PROCESS_ENDS_LATE))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


ONE_IS_KILLED = """
import os, signal, time
from secateur.runtime.distributed import process_group, rank_and_world_size
from secateur.runtime.signals import repeat_signals

with repeat_signals(), process_group():
    if rank_and_world_size()[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
"""


@pytest.mark.slow
def test_if_a_process_is_killed_torchrun_ends_the_others() -> None:
    start = time.monotonic()
    done = torchrun(program=("-c", ONE_IS_KILLED))
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert time.monotonic() - start < 60


def test_the_command_line_runs_under_torchrun(model_file: Path, tmp_path: Path) -> None:
    config = small_config(model_file)
    run(config, tmp_path / "alone")
    (tmp_path / "run.toml").write_text((tmp_path / "alone" / "config.toml").read_text())
    out = tmp_path / "together"
    done = torchrun("prune", "--config", tmp_path / "run.toml", "-o", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    assert (out / "plan.json").read_bytes() == (tmp_path / "alone" / "plan.json").read_bytes()


@pytest.mark.slow
def test_an_error_ends_all_processes(model_file: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    model = f"{model_file}:small"
    done = torchrun("prune", "-m", model, "-d", "folder:nowhere", "-o", tmp_path / "run")
    assert done.returncode != 0
    assert "no folder nowhere to read folder from" in done.stderr
    assert time.monotonic() - start < 60
