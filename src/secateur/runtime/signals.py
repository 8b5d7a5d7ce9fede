"""Handle requests to stop (SIGINT, SIGTERM): defer them until a step is done, or repeat them."""

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
"""Exit code after SIGINT; see `exit_code`."""
REPEAT_AFTER = 1.0
"""Seconds after which a request without effect is repeated."""
EXIT_AFTER = 4.0
"""Seconds after which the process exits wherever it is; its files are whole at any moment."""

_is_deferring = threading.Event()


class StopRequest(KeyboardInterrupt):
    """A request to stop, by the signal with this number."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code after a request to stop: 130 after SIGINT, 143 after SIGTERM."""
    return 128 + (stop.number if isinstance(stop, StopRequest) else signal.SIGINT)


class DeferredSignals:
    """Whether this process was asked to stop while signals were deferred."""

    def __init__(self) -> None:
        self.is_pending: bool = False
        self.number: int = signal.SIGINT
        """The signal, if one is pending."""

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.is_pending, self.number = True, number


@contextlib.contextmanager
def defer_signals() -> Iterator[DeferredSignals]:
    """Record SIGINT and SIGTERM within the block instead of raising them.

    The caller decides what to do about a recorded one. Does nothing outside of the main thread,
    which alone receives signals.
    """
    deferred = DeferredSignals()
    if threading.current_thread() is not threading.main_thread():
        yield deferred
        return
    handlers = {number: signal.signal(number, deferred._record) for number in SIGNALS}
    is_outermost = not _is_deferring.is_set()
    _is_deferring.set()
    try:
        yield deferred
    finally:
        if is_outermost:
            _is_deferring.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def repeat_signals() -> Iterator[None]:
    """Raise `StopRequest` on SIGINT and SIGTERM, again and again until the block has ended.

    Once is not enough: Python drops what is raised in callbacks of its garbage collector, and
    some libraries catch every exception. If repeating does not end the block either, as in a long
    computation in one operation, the process exits with the signal's exit code, unless signals are
    deferred just then. An exception that a request causes elsewhere also becomes a `StopRequest`.
    """
    has_ended = threading.Event()
    requests: list[int] = []

    def repeat() -> None:
        deadline = time.monotonic() + EXIT_AFTER
        while not has_ended.wait(REPEAT_AFTER):
            if _is_deferring.is_set():
                continue
            if time.monotonic() >= deadline:
                os._exit(128 + requests[0])
            os.kill(os.getpid(), signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if has_ended.is_set():
            return
        requests.append(number)
        if len(requests) == 1:
            threading.Thread(target=repeat, daemon=True).start()
        raise StopRequest(requests[0])

    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        is_success = isinstance(error, SystemExit) and not error.code
        if requests and not is_success and not isinstance(error, KeyboardInterrupt):
            raise StopRequest(requests[0]) from error  # an interrupted import raises ImportError
        raise
    finally:
        has_ended.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
