"""The hardware and the releases that a result was measured with."""

from __future__ import annotations

import os
import platform

import numpy as np
import torch
import torchvision

from secateur.runtime.precision import accelerator_name
from secateur.runtime.schema import Record
from secateur.version import __version__


class Environment(Record):
    """Where a run took place."""

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
    """What training runs on where that is not the processor, as torch calls it."""


def environment() -> Environment:
    """This machine and the versions at work."""
    capabilities = torch.cpu.get_capabilities()
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
        accelerator=accelerator_name(),
    )
