"""How much memory a pass over images takes, and how much there is: looked at before it is short."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

SHARE = 0.5
"""Of what is free, for the values of a batch; the rest is for what operations take meanwhile."""
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still have on a device, within its container where it is in one.

    Raises nothing where the system does not tell: then it is as if there were no bound.
    """
    if device.type == "cuda":
        # What torch keeps of what was freed is there for the next tensors.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return min(int(psutil.virtual_memory().available), _container_bytes())


def _container_bytes() -> int:
    try:
        most = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            name, _, size = line.partition(" ")
            if name == "inactive_file":  # read from files, and given up when memory is short
                used -= int(size)
    except (OSError, ValueError):  # no container, or no bound
        return 2**63
    return max(0, most - used)
