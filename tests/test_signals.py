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
from secateur.runtime.signals import INTERRUPTED, defer_signals, repeat_signals


def dropped_once() -> None:
    """As Python drops what is raised in callbacks of its garbage collector."""
    with contextlib.suppress(BaseException):
        time.sleep(60)
    time.sleep(60)


def dropped_always() -> None:
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def raised() -> None:
    time.sleep(60)


def raised_as_another_error() -> None:
    try:
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ImportError("as from an interrupted import") from error


def deferred(folder: Path) -> None:
    with defer_signals() as signals:
        for _ in range(60):
            time.sleep(0.05)
        (folder / "done").write_text(str(signals.is_pending))
    raise KeyboardInterrupt


def work(job: str, folder: Path) -> None:
    jobs: dict[str, Callable[[], None]] = {
        "raised": raised,
        "dropped once": dropped_once,
        "another error": raised_as_another_error,
        "dropped always": dropped_always,
        "deferred": lambda: deferred(folder),
    }
    try:
        with repeat_signals():
            (folder / "started").touch()
            jobs[job]()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("job", "least", "most"),
    [
        ("raised", 0, 2),
        ("dropped once", 0.5, 4),
        ("another error", 0, 2),
        ("dropped always", 3, 5.5),
        ("deferred", 1, 5),
    ],
)
def test_the_process_ends_in_time(
    job: str, least: float, most: float, sent: signal.Signals, tmp_path: Path
) -> None:
    process = context().Process(target=work, args=(job, tmp_path))  # type: ignore[attr-defined]
    process.start()
    while not (tmp_path / "started").exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    start = time.monotonic()
    os.kill(process.pid, sent)
    process.join(30)
    assert process.exitcode == INTERRUPTED
    assert least <= time.monotonic() - start < most
    if job == "deferred":
        assert (tmp_path / "done").read_text() == "True"


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with repeat_signals(), defer_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
