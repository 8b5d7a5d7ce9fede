"""Requests to stop end the process, whatever drops them, and wait while they are deferred."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from processes import context
from secateur.runtime.signals import StopRequest, defer_signals, exit_code, repeat_signals


def wait(folder: Path) -> None:
    (folder / "started").touch()
    sleep()


def sleep() -> None:
    """Sleep for a minute, in parts: what arrives just before a sleep is noticed after it."""
    for _ in range(6000):
        time.sleep(0.01)


def dropped_once(folder: Path) -> None:
    """As Python drops what is raised in callbacks of its garbage collector."""
    with contextlib.suppress(BaseException):
        wait(folder)
    sleep()


def dropped_always(folder: Path) -> None:
    while True:
        try:
            wait(folder)
        except BaseException:
            continue


def raised_as_another_error(folder: Path) -> None:
    try:
        wait(folder)
    except KeyboardInterrupt as error:
        raise ImportError("as from an interrupted import") from error


def deferred(folder: Path) -> None:
    with defer_signals() as signals:
        (folder / "started").touch()
        while not signals.is_pending:
            time.sleep(0.01)
        (folder / "done").touch()
    raise StopRequest(signals.number)


def work(job: Callable[[Path], None], folder: Path) -> None:
    try:
        with repeat_signals():
            job(folder)
    except KeyboardInterrupt as stop:
        sys.exit(exit_code(stop))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("job", "least"),
    [
        *((wait, 0.0), (dropped_once, 0.5), (raised_as_another_error, 0.0)),
        *((dropped_always, 3.0), (deferred, 0.0)),
    ],
)
def test_the_process_ends_in_time(
    job: Callable[[Path], None], least: float, sent: signal.Signals, tmp_path: Path
) -> None:
    process = context().Process(target=work, args=(job, tmp_path))  # type: ignore[attr-defined]
    process.start()
    while not (tmp_path / "started").exists():
        assert process.is_alive()
        time.sleep(0.01)
    start = time.monotonic()
    os.kill(process.pid, sent)
    process.join(30)
    assert process.exitcode == {signal.SIGINT: 130, signal.SIGTERM: 143}[sent]
    assert time.monotonic() - start >= least
    assert (tmp_path / "done").exists() == (job is deferred)


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with repeat_signals(), defer_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
