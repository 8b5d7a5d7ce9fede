"""Derive the seed of each part of a run, so that its random numbers depend on its place alone."""

from __future__ import annotations

import numpy as np
import torch


def seed_of(*place: int) -> int:
    """Return a 64-bit seed for a place such as (seed of the run, epoch, step).

    Seeds of different places are as good as independent (numpy's `SeedSequence`).
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU and one device; `torch.manual_seed` seeds all, which takes almost 1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
