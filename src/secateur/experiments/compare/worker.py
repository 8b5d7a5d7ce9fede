"""The process that a sweep starts for the cells of a unit: `python -m
secateur.experiments.compare.worker`.

It reads its order from stdin, and ends when stdin does: then the sweep has gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from secateur.experiments.compare.runner import work
from secateur.runtime.signals import INTERRUPTED, repeat_signals


def main() -> None:
    """Works off an order; a request to terminate ends it with 130."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    say, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no message of ours
    try:
        with repeat_signals():
            work(Path(order["folder"]), order["cells"], say)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
