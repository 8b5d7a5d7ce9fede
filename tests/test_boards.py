"""The course of a training as TensorBoard reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from layouts import write_classes
from secateur.config import BaseConfig, RunConfig, from_dict
from secateur.errors import UsageError
from secateur.experiments.run import run
from secateur.experiments.train_base import train_base

pytest.importorskip("tensorboard", reason="TensorBoard is an extra")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BRIEF: dict[str, object] = {"epochs": 2, "batch_size": 8, "warmup_steps": 0, "workers": 0}


@pytest.fixture
def source(tmp_path: Path) -> str:
    for part, count in (("train", 20), ("val", 4)):
        write_classes(tmp_path / "images" / part, ["bird", "cat"], count)
    return f"folder:{tmp_path / 'images'}"


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve's points as TensorBoard shows them."""
    shown = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(point.step, point.value) for point in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def single(value: float) -> float:
    """As TensorBoard stores it, in 32 bits."""
    return float(np.float32(value))


def logged(path: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "epoch"]


def test_every_round_has_curves_of_its_own(source: str, model_file: Path, tmp_path: Path) -> None:
    content = {
        "model": {"name": f"{model_file}:small"},
        "data": {"source": source, "image_size": 16, "calibration_images": 24},
        "plan": {"target": "macs=0.6", "rounds": 2},
        "finetune": BRIEF,
    }
    run(from_dict(content, RunConfig), tmp_path / "run", board=tmp_path / "board")
    epochs = logged(tmp_path / "run")
    assert [(epoch["round"], epoch["number"]) for epoch in epochs] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    for number in (1, 2):
        found = curves(tmp_path / "board" / f"round-{number}")
        for fact, curve in (
            ("loss", "training/loss"),
            ("learning_rate", "training/learning_rate"),
            ("validation", "validation/top1_fraction"),
        ):
            own = [epoch for epoch in epochs if epoch["round"] == number]
            assert found[curve] == [(epoch["number"], single(epoch[fact])) for epoch in own]


def test_training_a_base_network_is_drawn_too(source: str, tmp_path: Path) -> None:
    content = {
        "model": {"name": "resnet20"},
        "data": {"source": source, "image_size": 16},
        "train": BRIEF,
    }
    result = train_base(from_dict(content, BaseConfig), tmp_path / "base", board=tmp_path / "board")
    assert curves(tmp_path / "board")["training/loss"] == [
        (epoch.number, single(epoch.loss)) for epoch in result.epochs
    ]


def test_without_tensorboard_it_is_said_before_anything_is_done(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = from_dict({"model": {"name": "resnet20"}, "data": {"source": source}}, BaseConfig)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[tensorboard\]'"):
        train_base(config, tmp_path / "base", board=tmp_path / "board")
