"""What became of a cell in one line without nesting: for data frames, and for tables made later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.errors import RunFolderError
from secateur.experiments.compare.runner import JobRecord, JobResult
from secateur.experiments.compare.spec import method_name
from secateur.pipeline.result import Stage
from secateur.runtime.environment import Environment
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import describe_error

STAGES: tuple[Stage, ...] = ("before", "cut", "refit", "distilled", "finetuned")


class Row(JobRecord):
    """A cell. Accuracies are fractions of the scored images; None is what it has not come to."""

    images: int | None = None
    """How many were scored."""
    before_top1_fraction: float | None = None
    cut_top1_fraction: float | None = None
    refit_top1_fraction: float | None = None
    distilled_top1_fraction: float | None = None
    finetuned_top1_fraction: float | None = None
    top1_fraction: float | None = None
    """At the end, whatever the last step was."""
    macs_left: float | None = None
    """Fraction of the network before the cut; so are the next two."""
    parameters_left: float | None = None
    latency_left: float | None = None
    """Timed while other cells may have been at work."""
    best_epoch: int | None = None
    """The epoch that was best on the validation images."""
    best_epoch_top1_fraction: float | None = None
    equivalence_error: float | None = None
    seconds: float | None = None
    """What all steps took, the pass that the criteria of a network share included."""
    plan_hash: str | None = None
    secateur: str | None = None
    torch: str | None = None
    processor: str | None = None
    cores: int | None = None
    threads: int | None = None
    accelerator: str | None = None

    @property
    def method(self) -> str:
        """The criterion with its variant."""
        return method_name(self.criterion, self.variant)

    def percent(self, stage: Stage | None = None) -> float | None:
        """Top-1 in % after a stage, or at the end."""
        name = "top1_fraction" if stage is None else f"{stage}_top1_fraction"
        fraction: float | None = getattr(self, name)
        return None if fraction is None else 100 * fraction


def row_of(cell: JobResult) -> Row:
    """The row of a cell."""
    facts = cell.model_dump(include=set(JobRecord.model_fields))
    result = cell.result
    if result is None:
        return Row(**facts)
    before, last, tuning = result.stages[0].score, result.stages[-1].score, result.finetuning
    for stage in STAGES:
        score = result.score(stage)
        facts[f"{stage}_top1_fraction"] = None if score is None else score.top1_fraction
    if tuning is not None:
        facts["best_epoch"] = tuning.best_epoch
        facts["best_epoch_top1_fraction"] = tuning.best.top1_fraction
    return Row(
        **facts,
        **place_of(result.environment),
        images=last.images,
        top1_fraction=last.top1_fraction,
        macs_left=last.macs / before.macs,
        parameters_left=last.parameters / before.parameters,
        latency_left=last.latency_ms / before.latency_ms,
        equivalence_error=result.equivalence_error,
        seconds=round(sum(stage.seconds for stage in result.stages), 1),
        plan_hash=result.plan_hash,
    )


def place_of(environment: Environment) -> dict[str, Any]:
    """What a row says of where it was measured."""
    return environment.model_dump(
        include={"secateur", "torch", "processor", "cores", "threads", "accelerator"}
    )


def to_lines(rows: Iterable[Row]) -> str:
    """A JSON object a line."""
    return "".join(json.dumps(row.model_dump(mode="json")) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """The rows in a file of JSON lines; raises `RunFolderError` that names the line."""
    try:
        lines = read_bounded(path, TEXT, RunFolderError).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path} can't be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            message = describe_error(error.errors()[0])
            raise RunFolderError(
                f"{path}, line {number}, is no row of a cell: {message}"
            ) from error
    return rows
