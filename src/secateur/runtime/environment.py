"""Describe the hardware and the package versions that a result was computed with."""

from __future__ import annotations

import os
import platform

import numpy as np
import torch
import torchvision

from secateur.runtime.device import CPU, accelerator_name
from secateur.runtime.schema import Record
from secateur.runtime.torch_internals import cpu_capabilities
from secateur.runtime.version import __version__


class Environment(Record):
    """The machine and the versions of a run."""

    secateur: str
    python: str
    torch: str
    torchvision: str
    numpy: str
    system: str
    processor: str
    cores: int
    threads: int
    accelerator: str | None = None
    """Device that the network ran on if it is not the CPU, as torch calls it."""


def environment(device: torch.device = CPU) -> Environment:
    """Return the description of this machine, of a network's device and of the versions."""
    capabilities = cpu_capabilities()
    return Environment(
        secateur=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        numpy=np.__version__,
        system=f"{platform.system()} {platform.machine()}",
        processor=str(capabilities.get("cpu_name") or platform.processor() or "unknown"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        threads=torch.get_num_threads(),
        accelerator=accelerator_name(device),
    )
