"""Derive the seed of each part of a run, so that its random numbers depend on its place alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def forked_generators(device: torch.device) -> Iterator[None]:
    """Put the states of the CPU's generator and of a device's back at the end of a block."""
    devices = [] if device.type in ("cpu", "mps") else [device]  # torch can't fork Apple's
    kind = "cuda" if not devices else device.type
    with torch.random.fork_rng(devices, device_type=kind):
        yield
