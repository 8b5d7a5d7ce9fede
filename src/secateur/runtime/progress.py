"""Report progress: bars through long loops, and a lasting line when a stage or a step of it ends.

The caller decides whether and how it is shown.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


@runtime_checkable
class ProgressCallback(Protocol):
    """Pass items through, and show how many are done and how long the rest will take."""

    def __call__(self, items: Iterable[T], title: str, total: int) -> Iterable[T]:
        """Return the items, unchanged; `total` is their number."""


def no_progress(items: Iterable[T], title: str, total: int) -> Iterable[T]:
    """Show nothing: a `ProgressCallback`."""
    del title, total
    return items


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if task.speed is None else f"{task.speed:.1f}/s", style="progress.data.speed"
        )


def progress_bars(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Show a bar on stderr, with the rate and the remaining time: a `ProgressCallback`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        for item in items:
            yield item
            progress.advance(task)


def has_live_display() -> bool:
    """Return whether stderr can show bars: a terminal, or a notebook that has ipywidgets."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


def live_progress() -> ProgressCallback:
    """Return progress bars where they can be shown, else a callback that shows nothing."""
    return progress_bars if has_live_display() else no_progress


def print_to_stderr(line: str) -> None:
    """Print a line that stays, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: `0.4 s`, `31 s`, `4 min`, `2 h 10 min`."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


class StageLines:
    """Lasting lines: the stages with an estimate, then one as each stage, epoch or job ends.

    Without `write` nothing is shown.
    """

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write
        self._started = self._since = time.monotonic()
        self._estimates: dict[str, float] = {}
        self._estimated_done, self._seconds_done = 0.0, 0.0
        self._step_seconds: list[float] = []

    @property
    def is_shown(self) -> bool:
        """Whether anybody sees the lines: otherwise no estimate is needed."""
        return self._write is not None

    @property
    def seconds(self) -> float:
        """Time since the lines were opened."""
        return time.monotonic() - self._started

    def plan(self, estimates: Mapping[str, float], memory_bytes: float | None = None) -> None:
        """Print the stages to come, with their estimated seconds together and the memory."""
        self._estimates = dict(estimates)
        self._since = time.monotonic()
        total = duration_text(sum(estimates.values()))
        memory = "" if memory_bytes is None else f" and {memory_bytes / 2**30:.1f} GiB"
        self._print(f"stages: {' → '.join(estimates)}; about {total}{memory} on this machine")

    def end_stage(self, stage: str, text: str = "") -> None:
        """Print that a stage has ended: what came of it, its time, and what time is left."""
        seconds = self._lap()
        if stage in self._estimates:
            self._estimated_done += self._estimates.pop(stage)
            self._seconds_done += seconds + sum(self._step_seconds)
        duration = duration_text(seconds + sum(self._step_seconds))
        self._step_seconds.clear()
        left = self._seconds_left() if any(self._estimates.values()) else 0.0
        self._print(self._line(f"{stage}: {text}" if text else stage, duration, left))

    def end_step(self, name: str, number: int, total: int, text: str) -> None:
        """Print that a step of a stage has ended: epoch or job `number` of `total`."""
        self._step_seconds.append(self._lap())
        mean = math.fsum(self._step_seconds) / len(self._step_seconds)
        duration = duration_text(self._step_seconds[-1])
        self._print(
            self._line(f"{name} {number}/{total}: {text}", duration, mean * (total - number))
        )

    def _lap(self) -> float:
        """Return the seconds since the last line, and start anew."""
        since, self._since = self._since, time.monotonic()
        return self._since - since

    def _seconds_left(self) -> float:
        """Return the estimate of the stages to come, corrected by how long the others took.

        The stages to come count as if they took as long as estimated: a first stage that is a small
        part of the whole corrects little, however wrong its own estimate was.
        """
        estimate = sum(self._estimates.values())
        return estimate * (self._seconds_done + estimate) / (self._estimated_done + estimate)

    def _line(self, text: str, duration: str, left: float) -> str:
        return f"{text} · {duration}" + (f", about {duration_text(left)} left" if left > 0 else "")

    def _print(self, line: str) -> None:
        if self._write is not None:
            self._write(line)
