"""A log of events, one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.runtime.atomic_io import append_line


class EventLog:
    """One JSON object a line, written as things happen."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: str, **facts: object) -> None:
        """Adds a line; does nothing where there is no file."""
        if self._path is None:
            return
        append_line(self._path, json.dumps({"event": event, **facts}))
