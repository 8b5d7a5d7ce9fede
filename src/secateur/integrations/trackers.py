"""Send the curves of a training to an experiment tracker, through accelerate's tracker classes."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path
from typing import Any

from secateur.errors import UnknownName, UsageError
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
    "validation": "validation/top1_fraction",
}
"""Facts of an epoch, and the names of their curves."""


def open_log(path: Path, tracker: str | None, tracker_dir: Path | None) -> EventLog:
    """Return the event log at `path`, which also sends curves to a tracker if one is named.

    `tracker` is one of `TRACKERS`. `tracker_dir` is where it keeps its files; TensorBoard needs it,
    Trackio has no such option. Raises `UnknownName`, and `UsageError` if the tracker's package or
    folder is missing.
    """
    return EventLog(path) if tracker is None else TrackerLog(path, tracker, tracker_dir)


class TrackerLog(EventLog):
    """An event log that also sends the curves of each training to a tracker.

    The tracker's run starts with the first epoch and has the run folder's name; every pruning round
    has a run of its own.
    """

    def __init__(self, path: Path, tracker: str, tracker_dir: Path | None) -> None:
        super().__init__(path)
        if tracker not in TRACKERS:
            raise UnknownName("tracker", tracker, TRACKERS)
        if importlib.util.find_spec(tracker) is None:
            raise UsageError(
                f"--tracker {tracker} needs a package: pip install {TRACKERS[tracker]}"
            )
        if tracker == "tensorboard" and tracker_dir is None:
            raise UsageError("--tracker tensorboard needs a folder: add --tracker-dir DIR")
        self._folder, self._name, self._tracker_dir = path.parent.name, tracker, tracker_dir
        self._round: object = None
        self._finish: weakref.finalize[..., Any] | None = None
        self._tracker: Any = None

    def write(self, event: str, **facts: object) -> None:
        """Append an event and its facts, and send those of an epoch to the tracker."""
        super().write(event, **facts)
        if event != "epoch":
            return
        if self._tracker is None or facts.get("round") != self._round:
            self._start(facts.get("round"))
        values = {curve: facts[fact] for fact, curve in CURVES.items() if facts[fact] is not None}
        self._tracker.log(values, step=facts["number"])

    def _start(self, pruning_round: object) -> None:
        """End the tracker's run if there is one, and start the next."""
        from accelerate import PartialState

        if self._finish is not None:
            self._finish()
        PartialState()  # accelerate's trackers log through it; training has configured it
        self._round = pruning_round
        self._tracker = self._make("" if pruning_round is None else f"round-{pruning_round}")
        self._tracker.start()
        self._finish = weakref.finalize(self, self._tracker.finish)
        self._finish.atexit = False  # then trackers end their runs themselves

    def _make(self, part: str) -> Any:
        from accelerate import tracking

        folder = None if self._tracker_dir is None else str(self._tracker_dir)
        name = "-".join(filter(None, (self._folder, part)))
        if self._name == "tensorboard":
            return tracking.TensorBoardTracker(part, folder)
        if self._name == "wandb":
            return tracking.WandBTracker(PROJECT, name=name, dir=folder)
        if self._name == "mlflow":
            return tracking.MLflowTracker(PROJECT, logging_dir=folder, run_name=name)
        return tracking.TrackioTracker(PROJECT, name=name)
