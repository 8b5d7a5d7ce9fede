"""Find out how much memory is free, before a computation runs out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

USABLE_FRACTION = 0.5
"""Fraction of the free memory for a batch's activations; operations need the rest."""
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return how many bytes this process can still allocate on a device or in its container.

    If the container's limit can't be read, there is none. Devices that say nothing of their memory,
    such as Apple's, count as sharing the host's.
    """
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):  # of CUDA and XPU
        # torch reuses the memory that it has reserved and that no tensor occupies.
        reusable = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0]) + int(reusable)
    return min(int(psutil.virtual_memory().available), _container_bytes())


def _container_bytes() -> int:
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == "inactive_file":  # the file cache, freed when memory is short
                used -= int(size)
    except (OSError, ValueError):  # no container, or no limit
        return 2**63
    return max(0, limit - used)
