"""The result of a job as one flat row: for data frames, and for tables that are made later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.experiments.compare.job import JobRecord, JobResult, method_name
from secateur.pipeline.result import Stage
from secateur.runtime.environment import Environment
from secateur.runtime.errors import RunFolderError
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import describe_error

STAGES: tuple[Stage, ...] = ("before", "cut", "refit", "distilled", "finetuned")


class Row(JobRecord):
    """The result of a job. Accuracies are fractions of the scored images, None if not measured."""

    images: int | None = None
    """Number of scored images."""
    before_top1_fraction: float | None = None
    cut_top1_fraction: float | None = None
    refit_top1_fraction: float | None = None
    distilled_top1_fraction: float | None = None
    finetuned_top1_fraction: float | None = None
    top1_fraction: float | None = None
    """After the last stage, whichever that is."""
    agreement_fraction: float | None = None
    """Fraction of images for which the original network predicts the same, after the last stage."""
    macs_left: float | None = None
    """MACs after pruning as a fraction of those before; so are parameters and latency."""
    parameters_left: float | None = None
    latency_left: float | None = None
    """May be measured while other jobs run on the same machine."""
    engine: str | None = None
    """What latency was measured in, with its version; None in the rows of older versions."""
    best_epoch: int | None = None
    """The epoch with the highest accuracy on the validation images."""
    best_epoch_top1_fraction: float | None = None
    equivalence_error: float | None = None
    seconds: float | None = None
    """Time of all stages, including the scoring pass that a network's criteria share."""
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
        """Return top-1 in % after a stage, by default the last one; None if not measured."""
        name = "top1_fraction" if stage is None else f"{stage}_top1_fraction"
        fraction: float | None = getattr(self, name)
        return None if fraction is None else 100 * fraction


def row_of(job: JobResult) -> Row:
    """Return the row of a job."""
    fields = job.model_dump(include=set(JobRecord.model_fields))
    result = job.result
    if result is None:
        return Row(**fields)
    before, last, finetuning = result.stages[0].score, result.stages[-1].score, result.finetuning
    for stage in STAGES:
        score = result.score(stage)
        fields[f"{stage}_top1_fraction"] = None if score is None else score.metric
    if finetuning is not None:
        fields["best_epoch"] = finetuning.best_epoch
        fields["best_epoch_top1_fraction"] = finetuning.best.metric
    return Row(
        **fields,
        **environment_fields(result.environment),
        images=last.images,
        top1_fraction=last.metric,
        agreement_fraction=last.agreement_fraction,
        macs_left=last.macs / before.macs,
        parameters_left=last.parameters / before.parameters,
        latency_left=last.latency_ms / before.latency_ms,
        engine=result.engine,
        equivalence_error=result.equivalence_error,
        seconds=round(sum(stage.seconds for stage in result.stages), 1),
        plan_hash=result.plan_hash,
    )


def environment_fields(environment: Environment) -> dict[str, Any]:
    """Return the fields of a row that say where it was measured."""
    return environment.model_dump(
        include={"secateur", "torch", "processor", "cores", "threads", "accelerator"}
    )


def to_lines(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines, one object a row."""
    return "".join(json.dumps(row.model_dump(mode="json")) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Return the rows in a file of JSON lines.

    Raises:
        RunFolderError: A line is not a row; the message has its number.
    """
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
                f"{path}, line {number}, is not a row of a benchmark: {message}"
            ) from error
    return rows
