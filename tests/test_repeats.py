"""Many runs in one process leave its state, and the user's network, unchanged."""

from __future__ import annotations

import gc
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import torch

import secateur
from fault_case import CLASSES, SIDE, Case, state_of
from secateur.data import FileImages
from secateur.data.preprocessing import Preprocessing
from secateur.experiments.run import run
from secateur.runtime.error_messages import explain


@pytest.mark.slow
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """`bench/faults.py repeats` does it a hundred times, and looks at the memory."""
    case = Case(tmp_path)
    case.write()
    torch.set_float32_matmul_precision("high")  # as a user may have set it
    try:
        model = secateur.load_model(case.model_name, num_classes=len(CLASSES)).train()
        model.get_submodule("bn1").eval()
        pixels = torch.rand(40, 3, SIDE, SIDE)
        images = [(pixels, torch.arange(40) % len(CLASSES))]
        before = state_of(model)
        process, files = psutil.Process(), []
        for _ in range(3):
            settings = {"finetune.batch_size": 16, "finetune.workers": 0}
            pruned = secateur.prune(model, images, target="macs=0.6", epochs=1, settings=settings)
            pruned.save(tmp_path / "run", overwrite=True)
            del pruned
            gc.collect()
            files.append((process.num_fds(), threading.active_count()))
        assert files[0] == files[-1]
        after = state_of(model)
        # beartype, which checks types in tests, draws from Python's random numbers.
        assert {key for key in before if before[key] != after[key]} <= {"python_seed"}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_reading_process_that_is_killed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, report_images=0)
    case.write()
    config = case.config(epochs=1)
    settings = config.finetune.model_copy(update={"workers": 1})
    here, read = os.getpid(), FileImages.read

    def killed(images: FileImages, numbers: torch.Tensor, expected: Preprocessing) -> torch.Tensor:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(images, numbers, expected)

    monkeypatch.setattr(FileImages, "read", killed)
    with pytest.raises(RuntimeError) as caught:
        run(config.model_copy(update={"finetune": settings}), tmp_path / "run")
    words = explain(caught.value)
    assert words is not None
    assert words.startswith("a process that reads images has died")
    assert "\n" not in words
    monkeypatch.undo()
    run(config, tmp_path / "run", resume=True)  # it resumes with the readers of before
