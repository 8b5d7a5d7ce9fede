"""Write a run's events to a log as they happen."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.runtime.atomic_io import append_line


class EventLog:
    """A file with one JSON object per line; without a path, events are dropped."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **facts: object) -> None:
        """Append an event and its facts; raises `WriteError`."""
        if self._path is None:
            return
        append_line(self._path, json.dumps({"event": event, **facts}))
