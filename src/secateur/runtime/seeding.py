"""Seeds for the parts of a run, so that each part's random numbers depend on its place alone."""

from __future__ import annotations

import numpy as np


def seed_of(*place: int) -> int:
    """A seed of 64 bits for a place such as (seed of the run, epoch, step).

    Different places give seeds that are as good as independent (numpy's `SeedSequence`).
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
