"""Send the curves of a training to an experiment tracker, through accelerate's tracker classes."""

from __future__ import annotations

import importlib.util
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.runtime.errors import UnknownName, UsageError
from secateur.runtime.event_log import EventLog

TRACKERS = {
    "tensorboard": "'secateur[tensorboard]'",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
"""Names of trackers, which are those of their packages, and what to pip install."""
PROJECT = "secateur"
"""Project or experiment that runs belong to, in trackers that have these."""
CURVES = {
    "loss": "training/loss",
    "learning_rate": "training/learning_rate",
    "validation": "validation/metric",
}
"""Facts of an epoch, and the names of their curves."""


@dataclass(frozen=True)
class Tracker:
    """An experiment tracker that curves go to; see `make_tracker`."""

    name: str
    """One of `TRACKERS`."""
    folder: Path | None = None
    """The folder of its files. By default, TensorBoard's are in `RUN-logs` beside the run folder
    RUN, and the others' where they choose; Trackio always chooses."""


def make_tracker(name: str | None, folder: Path | None) -> Tracker | None:
    """Return the tracker that `--tracker` and `--tracker-dir` name, or None if they name none.

    Raises `UnknownName`, and `UsageError` if the tracker's package is not installed.
    """
    if name is None:
        if folder is not None:
            raise UsageError("--tracker-dir needs a tracker: add --tracker tensorboard")
        return None
    if name not in TRACKERS:
        raise UnknownName("tracker", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"--tracker {name} needs a package: pip install {TRACKERS[name]}")
    return Tracker(name, folder)


def open_log(path: Path, tracker: Tracker | None) -> EventLog:
    """Return the event log at `path`, which also sends curves to the tracker if there is one."""
    return EventLog(path) if tracker is None else TrackerLog(path, tracker)


class TrackerLog(EventLog):
    """An event log that also sends the curves of each training to a tracker.

    The tracker's run starts with the first epoch and has the run folder's name; every pruning round
    has a run of its own.
    """

    def __init__(self, path: Path, tracker: Tracker) -> None:
        super().__init__(path)
        self._run_folder, self._tracker = path.parent, tracker
        self._round: object = None
        self._run: Any = None
        self._finish: weakref.finalize[..., Any] | None = None

    def write(self, event: str, **facts: object) -> None:
        """Append an event and its facts, and send those of an epoch to the tracker."""
        super().write(event, **facts)
        if event != "epoch":
            return
        if self._run is None or facts.get("round") != self._round:
            self._start(facts.get("round"))
        values = {curve: facts[fact] for fact, curve in CURVES.items() if facts[fact] is not None}
        self._run.log(values, step=facts["number"])

    def _start(self, pruning_round: object) -> None:
        """End the tracker's run if there is one, and start the next."""
        from accelerate import PartialState

        if self._finish is not None:
            self._finish()
        PartialState()  # accelerate's trackers log through it; training has configured it
        self._round = pruning_round
        self._run = self._make_run("" if pruning_round is None else f"round-{pruning_round}")
        self._run.start()
        self._finish = weakref.finalize(self, self._run.finish)
        self._finish.atexit = False  # then trackers end their runs themselves

    def _make_run(self, part: str) -> Any:
        from accelerate import tracking

        folder = None if self._tracker.folder is None else str(self._tracker.folder)
        run_name = self._run_folder.name
        name = f"{run_name}-{part}" if part else run_name
        if self._tracker.name == "tensorboard":
            default = self._run_folder.with_name(f"{run_name}-logs")
            return tracking.TensorBoardTracker(part, folder or str(default))
        if self._tracker.name == "wandb":
            return tracking.WandBTracker(PROJECT, name=name, dir=folder)
        if self._tracker.name == "mlflow":
            return tracking.MLflowTracker(PROJECT, logging_dir=folder, run_name=name)
        return tracking.TrackioTracker(PROJECT, name=name)
