"""Requests to stop are heard, whoever drops them."""

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


def swallowed_once() -> None:
    """As Python does with what is raised in the callbacks of its garbage collector."""
    with contextlib.suppress(BaseException):
        time.sleep(60)
    time.sleep(60)


def swallowed_always() -> None:
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def let_through() -> None:
    time.sleep(60)


def made_another_error() -> None:
    try:
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ImportError("as of a module whose import was cut off") from error


def held_for_a_while(place: Path) -> None:
    with defer_signals() as interrupts:
        for _ in range(60):
            time.sleep(0.05)
        (place / "done").write_text(str(interrupts.is_pending))
    raise KeyboardInterrupt


def work(job: str, place: Path) -> None:
    jobs: dict[str, Callable[[], None]] = {
        "through": let_through,
        "once": swallowed_once,
        "other": made_another_error,
        "always": swallowed_always,
        "held": lambda: held_for_a_while(place),
    }
    try:
        with repeat_signals():
            (place / "there").touch()
            jobs[job]()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("job", "least", "most"),
    [("through", 0, 2), ("once", 0.5, 4), ("other", 0, 2), ("always", 3, 5.5), ("held", 1, 5)],
)
def test_the_process_ends_in_time(
    job: str, least: float, most: float, sent: signal.Signals, tmp_path: Path
) -> None:
    process = context().Process(target=work, args=(job, tmp_path))  # type: ignore[attr-defined]
    process.start()
    while not (tmp_path / "there").exists():
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    since = time.monotonic()
    os.kill(process.pid, sent)
    process.join(30)
    assert process.exitcode == INTERRUPTED
    assert least <= time.monotonic() - since < most
    if job == "held":
        assert (tmp_path / "done").read_text() == "True"


def test_handlers_are_those_of_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with repeat_signals(), defer_signals():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
