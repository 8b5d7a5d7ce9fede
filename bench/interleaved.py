"""Times networks interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
REPEATS = (5, 15)
"""Least and most rounds; in between, rounds are repeated for `SECONDS`."""
SECONDS = 15.0


def time_interleaved(forwards: Mapping[str, Forward], images: Tensor) -> dict[str, list[float]]:
    """Return the seconds of each forward pass, by kind of network."""
    seconds: dict[str, list[float]] = {kind: [] for kind in forwards}
    least, most = REPEATS
    begin = time.perf_counter()
    with torch.no_grad():
        for round_ in range(most + 1):
            if round_ > least and time.perf_counter() - begin > SECONDS:
                break
            for kind, forward in forwards.items():
                start = time.perf_counter()
                forward(images)
                if round_ > 0:  # the first round warms up
                    seconds[kind].append(time.perf_counter() - start)
    return seconds
