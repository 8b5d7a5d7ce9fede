"""What accompanies a run through every step: progress, log, images left out, command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.config import RunConfig
from secateur.data import Unreadable
from secateur.runtime import distributed
from secateur.runtime.event_log import EventLog
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.trackers import Tracker, open_log


@dataclass(frozen=True, eq=False)
class RunContext:
    """The reporting of a run: progress, log, tracker and skipped images; by default none."""

    progress: ProgressCallback = no_progress
    command: str | None = None
    """The command line, for the record."""
    tracker: Tracker | None = None
    """Gets the curves of training."""
    log: EventLog = field(default_factory=lambda: EventLog(None))
    unreadable: Unreadable | None = None
    """Collects the images that can't be read; None makes them an error."""
    notices: list[str] = field(default_factory=list)
    """Collects what to know about the inputs, a sentence each."""

    def collecting_unreadable(self, config: RunConfig) -> RunContext:
        """Return a copy with an empty collector, or none, as the configuration says."""
        unreadable = Unreadable() if config.data.skip_unreadable else None
        return replace(self, unreadable=unreadable)

    def logging_to(self, path: Path | None) -> RunContext:
        """Return a copy that logs to a file, and to the tracker; only the main process writes."""
        if path is None or not distributed.is_main_process():
            return replace(self, log=EventLog(None))
        return replace(self, log=open_log(path, self.tracker))

    @property
    def unreadable_files(self) -> tuple[str, ...]:
        """The files that any process has left out, sorted; every process must ask."""
        names = () if self.unreadable is None else self.unreadable.names
        return tuple(sorted({name for names in distributed.all_gather(names) for name in names}))
