"""Training a base network: its folder is checked before anything is written to it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import pytest

from secateur.config import BaseConfig, from_dict
from secateur.experiments.train_base import train_base
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import RunFolderError, UsageError

T = TypeVar("T")


class Stop(Exception):
    """What ends a training in these tests."""


def stopping(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """Breaks off the first epoch."""
    if title.startswith("epoch"):
        raise Stop
    return items


def config(model_file: Path, **changes: object) -> BaseConfig:
    content = {
        "model": {"name": f"{model_file}:small"},
        "data": {"source": "digits", "image_size": 16},
        "train": {"epochs": 1, "flip": False, **changes},
    }
    return from_dict(content, BaseConfig)


def test_a_training_is_resumed_as_it_was_begun(model_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    with pytest.raises(Stop):
        train_base(config(model_file), folder, RunContext(stopping))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"train\.learning_rate = 0\.1, not 0\.2: resume it"):
        train_base(config(model_file, learning_rate=0.2), folder, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(train_base(config(model_file, workers=0), folder, resume=True).epochs) == 1


def test_no_base_network_is_trained_in_the_folder_of_a_run(
    model_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").touch()
    with pytest.raises(RunFolderError, match="holds a run, not a base network"):
        train_base(config(model_file), tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]
