"""Times networks interleaved, so that a busy machine slows all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from secateur.runtime.timing import Rounds, interleaved_seconds

Forward = Callable[[Tensor], Tensor]
ROUNDS = Rounds(fewest=5, most=15, seconds=15.0, warm_up=1)


def time_interleaved(forwards: Mapping[str, Forward], images: Tensor) -> dict[str, list[float]]:
    """Return the seconds of each forward pass, by kind of network."""
    with torch.no_grad():
        return interleaved_seconds(forwards, lambda kind: partial(forwards[kind], images), ROUNDS)
