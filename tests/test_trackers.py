"""Curves of a training, as TensorBoard reads them, and errors of trackers."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from layouts import write_classes
from secateur.config import BaseConfig, RunConfig, from_dict
from secateur.experiments.run import run
from secateur.experiments.train_base import train_base
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import UnknownName, UsageError
from secateur.runtime.trackers import Tracker, make_tracker, open_log

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
    accumulator = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(point.step, point.value) for point in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def single(value: float) -> float:
    """As TensorBoard stores it, in 32 bits."""
    return float(np.float32(value))


def logged(path: Path) -> list[dict[str, float]]:
    events = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "epoch"]


def test_every_round_has_curves_of_its_own(source: str, model_file: Path, tmp_path: Path) -> None:
    content = {
        "model": {"name": f"{model_file}:small", "allow_untrained": True},
        "data": {"source": source, "image_size": 16, "calibration_images": 24},
        "plan": {"target": "macs=0.6", "rounds": 2},
        "finetune": BRIEF,
    }
    run(
        from_dict(content, RunConfig),
        tmp_path / "run",
        RunContext(tracker=Tracker("tensorboard", tmp_path / "logs")),
    )
    epochs = logged(tmp_path / "run")
    assert [(epoch["round"], epoch["number"]) for epoch in epochs] == [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ]
    for number in (1, 2):
        drawn = curves(tmp_path / "logs" / f"round-{number}")
        for fact, curve in (
            ("loss", "training/loss"),
            ("learning_rate", "training/learning_rate"),
            ("validation", "validation/metric"),
        ):
            assert drawn[curve] == [
                (epoch["number"], single(epoch[fact]))
                for epoch in epochs
                if epoch["round"] == number
            ]


def test_training_a_base_network_is_drawn_too(source: str, tmp_path: Path) -> None:
    content = {
        "model": {"name": "resnet20"},
        "data": {"source": source, "image_size": 16},
        "train": BRIEF,
    }
    result = train_base(
        from_dict(content, BaseConfig),
        tmp_path / "base",
        RunContext(tracker=Tracker("tensorboard", tmp_path / "logs")),
    )
    assert curves(tmp_path / "logs")["training/loss"] == [
        (epoch.number, single(epoch.loss)) for epoch in result.epochs
    ]


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("tensorboard", "'secateur[tensorboard]'"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named(
    tracker: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape(f"pip install {package}")):
        make_tracker(tracker, tmp_path)


def test_unknown_and_missing_trackers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean tensorboard"):
        make_tracker("tensorbord", tmp_path)
    with pytest.raises(UsageError, match="--tracker tensorboard"):
        make_tracker(None, tmp_path)
    assert make_tracker(None, None) is None


class Recorder:
    """A package such as wandb or Trackio, as far as accelerate calls it."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def init(self, **options: object) -> Recorder:
        self.calls.append(("init", options["project"], options["name"]))
        return self

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_the_same_curves(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, tracker, recorder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: recorder if name == tracker else find_spec(name)
    )
    (tmp_path / "first").mkdir()
    log = open_log(tmp_path / "first" / "log.jsonl", make_tracker(tracker, None))
    log.write("start")
    assert recorder.calls == []
    for number in (1, 2):
        log.write("epoch", round=number, number=1, loss=2.0, learning_rate=0.1, validation=None)
    del log
    curves = {"training/loss": 2.0, "training/learning_rate": 0.1}
    step = recorder.calls[1][1]
    assert step == 1 or tracker == "trackio"  # accelerate 1.10 lets Trackio count
    assert recorder.calls == [
        ("init", "secateur", "first-round-1"),
        ("log", step, curves),
        ("finish",),
        ("init", "secateur", "first-round-2"),
        ("log", step, curves),
        ("finish",),
    ]
