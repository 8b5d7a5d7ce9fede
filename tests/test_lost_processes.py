"""Of several processes one is lost: the others end soon, with one line that says so."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fault_case import SIDE, Case
from processes import context
from secateur.runtime import watchdog

SIZE = 3
SHORT_SILENCE = 6.0
"""Seconds, for one that sends no more signs of life; it is 20 where nobody tests."""
STAGES = ("scoring", "refit", "training", "long work")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def dying(function: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The function, but for one process that is lost where it is called."""

    def called(*arguments: Any, **options: Any) -> Any:
        if rank == SIZE - 1:
            time.sleep(1.0)  # the others go on to where they need it
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return called


def prune_as(rank: int, port: int, stage: str, folder: Path) -> None:
    """The command line, as one of several processes that torchrun might have started."""
    from secateur.cli import app
    from secateur.pipeline import scoring_context
    from secateur.pruning.refit import refit_and_check
    from secateur.training.trainer import _Run

    patch = pytest.MonkeyPatch()
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
    os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    if stage == "scoring":
        patch.setattr(
            scoring_context, "collect_plan_inputs", dying(scoring_context.collect_plan_inputs, rank)
        )
    elif stage == "refit":
        patch.setattr(refit_and_check, "refit", dying(vars(refit_and_check)["refit"], rank))
    elif stage == "training":
        patch.setattr(_Run, "_step", dying(_Run._step, rank))
    elif rank < SIZE - 1:  # the others are busy and don't hear of it
        patch.setattr(watchdog, "SILENCE", SHORT_SILENCE)
        patch.setattr(scoring_context, "collect_plan_inputs", lambda *_, **__: time.sleep(300))
    else:
        patch.setattr(
            scoring_context, "collect_plan_inputs", dying(scoring_context.collect_plan_inputs, rank)
        )
    case = Case(folder)
    data = ["--data", case.source, "--image-size", str(SIDE), "--calibration-images", "24"]
    training_options = ["--epochs", "1", "--set", "finetune.batch_size=18"]
    model = ["--model", case.model_name, "--out", str(folder / "run")]
    sys.argv = ["secateur", "prune", *model, *data, *training_options]
    app.main()


def test_processes_that_are_started_again_say_it_under_other_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store of `torchrun` still has what those before them said last."""
    before = watchdog._key(1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert watchdog._key(1) != before


@pytest.mark.parametrize("stage", STAGES)
def test_the_others_end_soon_and_say_why(stage: str, tmp_path: Path) -> None:
    Case(tmp_path).write()
    port = free_port()
    processes = [
        context().Process(target=prune_as, args=(rank, port, stage, tmp_path))  # type: ignore[attr-defined]
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    processes[-1].join(100)
    since = time.monotonic()
    assert processes[-1].exitcode == -signal.SIGKILL
    for process in processes[:-1]:
        process.join(60 - (time.monotonic() - since))
    assert time.monotonic() - since < 60
    for rank, process in enumerate(processes[:-1]):
        words = (tmp_path / f"{rank}.err").read_text()
        assert process.exitcode == 1, words
        lines = [line for line in words.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, words
        assert "process" in lines[0]
        assert "Traceback" not in words
    assert not (tmp_path / "run").exists() or stage == "training"
