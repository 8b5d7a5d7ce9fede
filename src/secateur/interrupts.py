"""Requests to stop that wait until a step is whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Whether this process was asked to stop while `held` kept that from happening."""

    def __init__(self) -> None:
        self.is_pending: bool = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.is_pending = True


@contextlib.contextmanager
def held() -> Iterator[Interrupts]:
    """Within the block SIGINT and SIGTERM are noted instead of raised.

    What is done about them is up to whoever holds them. Outside of the main thread, which alone
    gets signals, nothing is held.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts._note) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
