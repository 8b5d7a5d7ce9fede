"""A job of a benchmark, one pruning run, and the record of its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateur.config import RunConfig
from secateur.pipeline.result import RunResult
from secateur.runtime.schema import Record

SCHEMA_VERSION = 3


def method_name(criterion: str, variant: str) -> str:
    """Return the name of a method in tables: the criterion and the variant, if there is one."""
    return f"{criterion}, {variant}" if variant else criterion


@dataclass(frozen=True)
class Job:
    """One run of a benchmark."""

    network: str
    variant: str
    criterion: str
    target: str
    seed: int
    config: RunConfig
    id: str
    """A hash of everything that the result may depend on."""

    @property
    def scoring_pass(self) -> tuple[str, str, int]:
        """Jobs with equal keys share one pass over the calibration images."""
        return self.network, self.variant, self.seed


class JobRecord(Record):
    """Which job it is, and its outcome."""

    id: str
    """See `Job.id`."""
    network: str
    variant: str
    criterion: str
    target: str
    seed: int
    outcome: Literal["done", "failed"]
    reason: str = ""
    """Why the job failed, in one line; empty if it didn't."""
    score_on: Literal["test", "validation"]
    """The images that accuracies are measured on."""


class JobResult(JobRecord):
    """The outcome of a job with the whole result of its run, as stored in `jobs/ID.json`."""

    schema_version: int = SCHEMA_VERSION
    result: RunResult | None = None
    """None if the job failed."""
