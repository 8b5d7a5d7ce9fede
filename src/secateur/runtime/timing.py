"""The one loop that times anything.

A machine slows down and speeds up while it is measured. So whatever is compared is interleaved: a
round runs every action once, and a slower minute slows all of them alike. Each round has an order
of its own: in a fixed one the scheduler of a busy machine interrupts the same action again and
again, whose median then is several times too long.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from secateur.runtime.device import synchronize

LATENCY_BATCH = 16
"""Images in the batch that latency is measured with, where one pass takes no longer than this:"""
LONGEST_PASS = 0.5
"""Seconds; on slower networks the batch is smaller (`batch_in_time`)."""
COPIES = 3
"""Of what an engine prepares, to be timed in turn."""

Key = TypeVar("Key")
Action = Callable[[], object]


@dataclass(frozen=True)
class Rounds:
    """How often interleaved actions are timed."""

    fewest: int
    most: int
    seconds: float = math.inf
    """Time after which no further round starts, once the fewest are done."""
    warm_up: int = 0
    """Rounds that come first and don't count."""


def interleaved_medians(actions: Mapping[Key, Action], rounds: Rounds) -> dict[Key, float]:
    """Return the median time in ms of each action; a round runs each of them once."""
    times = interleaved_seconds(actions, actions.__getitem__, rounds)
    return {key: 1e3 * statistics.median(runs) for key, runs in times.items()}


def interleaved_seconds(
    keys: Iterable[Key], prepare: Callable[[Key], Action], rounds: Rounds
) -> dict[Key, list[float]]:
    """Return the seconds of every run of each key's action, without the warm-up rounds.

    A round goes through `keys`, which may name a key more than once, in arbitrary order.
    `prepare(key)` returns the action that is timed; preparing it is not.
    """
    order, generator = list(keys), random.Random(0)
    times: dict[Key, list[float]] = {key: [] for key in order}
    start = time.perf_counter()
    for number in range(rounds.warm_up + rounds.most):
        is_late = time.perf_counter() - start > rounds.seconds
        if is_late and number >= rounds.warm_up + rounds.fewest:
            break
        generator.shuffle(order)
        for key in order:
            duration = seconds(prepare(key))
            if number >= rounds.warm_up:
                times[key].append(duration)
    return times


def in_turn(prepare: Callable[[], Action]) -> Action:
    """Return an action that runs `COPIES` prepared actions in turn; each has run once.

    What an engine prepares is unlucky at times: of equal sessions of onnxruntime one in ten took a
    tenth longer in every run, presumably by where its memory lies. The median passes over it.
    """
    actions = [prepare() for _ in range(COPIES)]
    for action in actions:
        action()
    turns = itertools.cycle(actions)
    return lambda: next(turns)()


def repeat_to_batch(images: Tensor, size: int) -> Tensor:
    """Return `size` images: those given, `[image, channel, …]`, over and over."""
    return images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]


def batch_in_time(run: Callable[[Tensor], object], images: Tensor) -> Tensor:
    """Return the batch to measure latency with: 16 images, or 8, 4, 2, 1 if they take too long.

    How long they take is told by one image, which goes through `run` twice.
    """
    run(images[:1])  # warms up
    duration = seconds(lambda: run(images[:1]))
    size = LATENCY_BATCH
    while size > 1 and size * duration > LONGEST_PASS:
        size //= 2
    return repeat_to_batch(images, size)


def seconds(action: Action) -> float:
    """Return how long an action takes, the accelerator's work included."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start
