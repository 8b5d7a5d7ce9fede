"""The course of a training as curves for TensorBoard, which is an extra."""

from __future__ import annotations

from pathlib import Path

from secateur.errors import UsageError
from secateur.runtime.event_log import EventLog

CURVES = {
    "loss": "training/loss",
    "learning_rate": "training/learning_rate",
    "validation": "validation/top1_fraction",
}
"""Facts of an epoch, and what their curves are called."""


class TrackerLog(EventLog):
    """An event log that also draws a point of each curve after every epoch, in a folder.

    Every round of scoring and training has curves of its own.
    """

    def __init__(self, path: Path | None, folder: Path) -> None:
        """Raises `UsageError` where TensorBoard is not installed."""
        super().__init__(path)
        self._folder = folder
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs the extra: pip install 'secateur[tensorboard]'"
            ) from error
        self._writer = SummaryWriter

    def write(self, event: str, **facts: object) -> None:
        """See `EventLog.write`."""
        super().write(event, **facts)
        if event != "epoch":
            return
        folder = self._folder / f"round-{facts['round']}" if "round" in facts else self._folder
        with self._writer(str(folder)) as writer:
            for fact, curve in CURVES.items():
                if facts[fact] is not None:
                    writer.add_scalar(curve, facts[fact], facts["number"])


def open_log(path: Path, board: Path | None) -> EventLog:
    """A log in a file, with curves where there is a folder for them."""
    return EventLog(path) if board is None else TrackerLog(path, board)
