"""Requests to stop: ones that wait until a step is whole, and ones that are not to get lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit code after a request to stop."""
AGAIN = 1.0
"""Seconds after which a request that has had no effect is made again."""
PATIENCE = 4.0
"""Seconds after which the process ends where it is; what it has written is whole at any moment."""

_holding = threading.Event()


class Interrupts:
    """Whether this process was asked to stop while `held` kept that from happening."""

    def __init__(self) -> None:
        self.is_pending: bool = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.is_pending = True


@contextlib.contextmanager
def defer_signals() -> Iterator[Interrupts]:
    """Within the block SIGINT and SIGTERM are noted instead of raised.

    What is done about them is up to whoever holds them. Outside of the main thread, which alone
    gets signals, nothing is held.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts._note) for number in SIGNALS}
    is_outermost = not _holding.is_set()
    _holding.set()
    try:
        yield interrupts
    finally:
        if is_outermost:
            _holding.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def repeat_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM raise `KeyboardInterrupt`, and again until it has ended.

    Python drops what is raised where nobody can catch it, as in the callbacks of its garbage
    collector, and libraries have handlers that catch everything. Where even that does not end the
    block, as in a long computation of one operation, the process ends with `INTERRUPTED`, unless
    it holds its requests to stop (`held`). Another error that comes of a request is one, too.
    """
    ended = threading.Event()
    asked = threading.Event()

    def insist() -> None:
        until = time.monotonic() + PATIENCE
        while not ended.wait(AGAIN):
            if _holding.is_set():
                continue
            if time.monotonic() >= until:
                os._exit(INTERRUPTED)
            os.kill(os.getpid(), signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        if ended.is_set():
            return
        if not asked.is_set():
            asked.set()
            threading.Thread(target=insist, daemon=True).start()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        is_end = isinstance(error, SystemExit) and not error.code
        if asked.is_set() and not is_end and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # an import that is cut off is an ImportError
        raise
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
