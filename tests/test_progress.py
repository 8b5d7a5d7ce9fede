"""Progress: the lines that stay, and where bars are shown."""

from __future__ import annotations

import io

import pytest

from secateur.config import RunConfig, from_dict
from secateur.pipeline.estimate import REPORT_STAGE, estimate
from secateur.pipeline.inputs import load_inputs
from secateur.runtime import progress
from secateur.runtime.progress import StageLines, duration_text, live_progress, no_progress


class Clock:
    """A clock that stands still unless it is set forward."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_stages_leave_lines_with_the_time_taken_and_left(clock: Clock) -> None:
    written: list[str] = []
    lines = StageLines(written.append)
    lines.plan({"score": 10, "cut": 20, "report": 30})
    clock.seconds += 20  # twice the estimate
    lines.end_stage("score", "top-1 91.00 %")
    clock.seconds += 40
    lines.end_stage("cut")
    clock.seconds += 15
    lines.end_stage("report")
    assert written == [
        "stages: score → cut → report; about 60 s on this machine",
        "score: top-1 91.00 % · 20 s, about 58 s left",
        "cut · 40 s, about 45 s left",
        "report · 15 s",
    ]
    assert lines.seconds == 75


def test_epochs_leave_lines_and_their_stage_has_the_time_of_all(clock: Clock) -> None:
    written: list[str] = []
    lines = StageLines(written.append)
    lines.plan({"fine-tune": 30, "report": 10})
    for epoch, seconds in ((1, 10), (2, 30), (3, 20)):
        clock.seconds += seconds
        lines.end_step("epoch", epoch, 3, "loss 0.500")
    clock.seconds += 3
    lines.end_stage("fine-tune")
    assert written[1:] == [
        "epoch 1/3: loss 0.500 · 10 s, about 20 s left",
        "epoch 2/3: loss 0.500 · 30 s, about 20 s left",
        "epoch 3/3: loss 0.500 · 20 s",
        "fine-tune · 63 s, about 18 s left",
    ]


def test_a_small_first_stage_that_takes_long_does_not_spoil_the_estimate(clock: Clock) -> None:
    written: list[str] = []
    lines = StageLines(written.append)
    lines.plan({"score": 1, "cut": 300})
    clock.seconds += 50
    lines.end_stage("score")
    assert written[-1] == "score · 50 s, about 6 min left"  # not 50 times 300 s


def test_without_a_plan_stages_have_no_time_left(clock: Clock) -> None:
    written: list[str] = []
    lines = StageLines(written.append)
    clock.seconds += 2
    lines.end_stage("report")
    assert written == ["report · 2.0 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.44, "9.4 s"),
        (9.6, "10 s"),
        (99, "99 s"),
        (100, "2 min"),
        (8000, "2 h 13 min"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_outside_a_terminal_there_are_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert live_progress() is no_progress


@pytest.mark.parametrize("has_widgets", [False, True])
def test_notebooks_have_bars_only_with_ipywidgets(
    monkeypatch: pytest.MonkeyPatch, has_widgets: bool
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    spec = object() if has_widgets else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert (live_progress() is not no_progress) == has_widgets


def test_the_plan_names_the_stages_that_the_configuration_asks_for() -> None:
    tables = {
        "model": {"name": "resnet20"},
        "data": {"source": "digits", "calibration_images": 50},
        "plan": {"rounds": 2},
        "refit": {"layers": "none", "recalibrate_batchnorm": False},
        "finetune": {"epochs": 2},
    }
    config = from_dict(tables, RunConfig)
    dataset, model = load_inputs(config)
    estimates = dict(estimate(model, dataset, config).seconds)
    assert list(estimates) == [
        "score original",
        "score filters and cut",
        "fine-tune",
        "score filters and cut (round 2)",
        "fine-tune (round 2)",
        REPORT_STAGE,
    ]
    assert all(seconds > 0 for seconds in estimates.values())
    twice = from_dict({**tables, "finetune": {"epochs": 4}}, RunConfig)
    longer = dict(estimate(model, dataset, twice).seconds)
    ratio = longer["fine-tune"] / longer["score original"]
    assert ratio > 1.5 * estimates["fine-tune"] / estimates["score original"]
