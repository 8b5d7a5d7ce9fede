"""What a run found: scores by stage, what went, and all that is needed to do it again."""

from __future__ import annotations

import os
import platform
from typing import Literal

import numpy as np
import torch
import torchvision
from pydantic import BaseModel, ConfigDict

from secateur.config import RunConfig
from secateur.evaluate import Score
from secateur.finetune import Epoch
from secateur.norms import NormChange
from secateur.polish import Polish
from secateur.refit import LayerRefit
from secateur.search import Trial

SCHEMA_VERSION = 1
Stage = Literal["before", "cut", "refit", "polished", "tuned"]


class Record(BaseModel):
    """A part of the result; unknown keys are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class StageResult(Record):
    """The network after one step."""

    stage: Stage
    score: Score
    """On the test images."""
    seconds: float
    """What the step itself took, without the scoring."""


class GroupResult(Record):
    """What became of one group of filters."""

    name: str
    filters: int
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    """By the criterion, in the order of the filters; higher stays."""


class FrozenResult(Record):
    """Filters that could not be cut."""

    name: str
    filters: int
    reason: str


class EpochResult(Record):
    """One pass of fine-tuning."""

    epoch: Epoch
    validation_top1_fraction: float


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


class RunResult(Record):
    """A whole run."""

    schema_version: int = SCHEMA_VERSION
    command: str | None
    """The command line, where there was one."""
    config: RunConfig
    environment: Environment
    class_names: tuple[str, ...]
    plan_hash: str
    law_error: float
    """Largest relative difference between the cut network and the original with the removed
    channels silenced, on one batch of probe images."""
    stages: tuple[StageResult, ...]
    groups: tuple[GroupResult, ...]
    frozen: tuple[FrozenResult, ...]
    trials: tuple[Trial, ...] = ()
    """The sizes that were tried where the run looked for the smallest network."""
    refit: tuple[LayerRefit, ...]
    norms: NormChange | None
    """None where no statistics were to be re-estimated, or there are none."""
    polish: Polish | None
    """None without polishing."""
    epochs: tuple[EpochResult, ...]
    unreadable: tuple[str, ...] = ()
    """Image files that were left out everywhere because they can't be read."""

    def score(self, stage: Stage) -> Score | None:
        """The score of a stage, if the run came to it."""
        return next((s.score for s in self.stages if s.stage == stage), None)


def environment() -> Environment:
    """This machine and the versions at work."""
    from secateur import __version__

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
    )
