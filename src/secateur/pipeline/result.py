"""The result of a run: scores by stage, what was removed, and what it takes to repeat the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from secateur.config import ENGINE_TITLES, EngineName, ReportSection, RunConfig, Section
from secateur.data.kept_classes import KeptClasses
from secateur.graph.factorisation import Form
from secateur.models.published import transform_notice
from secateur.models.score import Score, metric_text
from secateur.models.task import Task
from secateur.pruning.outcome import (
    BatchNormRecalibration,
    LayerRefit,
    RefitCheck,
    Sensitivity,
    SizeTrial,
    sensitivity_rows,
)
from secateur.runtime.environment import Environment
from secateur.runtime.errors import RunFolderError, UsageError
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import Record, parse_record
from secateur.training.outcome import KEYS_FREE_ON_RESUME, KEYS_WITHOUT_EFFECT, Distillation, Epoch

SCHEMA_VERSION = 5
RESULT = "result.json"
IDLE_KEYS = frozenset(
    [
        *(f"finetune.{name}" for name in KEYS_WITHOUT_EFFECT),
        *(f"report.{name}" for name in ReportSection.model_fields),
        *("model.allow_untrained", "model.device"),
    ]
)
"""Keys of a configuration that change no result, or only by rounding."""
FREE_KEYS = IDLE_KEYS | {"data.batch_size", *(f"finetune.{name}" for name in KEYS_FREE_ON_RESUME)}
"""Keys that may differ when an unfinished run is resumed."""
LEAST_FALL = 0.05
"""Least fall of the MACs, as a fraction, from which on latency is compared with it."""
Stage = Literal["before", "cut", "refit", "distilled", "finetuned"]
_TITLES: dict[Stage, str] = {
    "before": "score original",
    "cut": "score filters and cut",
    "refit": "refit",
    "distilled": "distill",
    "finetuned": "fine-tune",
}


class StageResult(Record):
    """The network after one stage."""

    stage: Stage
    round: int = 1
    """Which cut it belongs to, from 1."""
    score: Score
    """On the test images."""
    seconds: float
    """Time of the stage itself, without the scoring."""


class GroupResult(Record):
    """One channel group, and which of its filters were removed."""

    name: str
    filters: int
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    """By the criterion, in the order of the filters; high scores stay. A filter that was removed in
    an earlier round keeps the score that it had then."""
    sensitivity: tuple[float, ...] = ()
    """Estimated error at the output of the original network if its 0, 1, … last-ranked filters go
    and nothing else does: divergence in nats, of values half their relative squared error. Empty if
    the allocation did not measure it."""


class FrozenResult(Record):
    """Filters that could not be cut."""

    name: str
    filters: int
    reason: str


class SplitResult(Record):
    """A convolution that became two, one after the other."""

    name: str
    form: Form
    rank: int
    """Channels between the two."""
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    """Shapes of the two kernels: output, input, height, width."""


class DroppedResult(Record):
    """A residual branch that a constant takes the place of."""

    name: str
    module: str
    """The module that gave its output, and that is the constant now."""
    macs: int
    """Multiply-accumulates per image that it took."""
    params: int
    """Parameters that it had beyond those of the constant."""


KeptWeights = Literal["last", "best", "start"]


class FinetuneResult(Record):
    """The outcome of fine-tuning."""

    epochs: tuple[Epoch, ...]
    before_metric: float
    """The metric on the validation images before the first epoch."""
    best_epoch: int
    """The first of the epochs that were best on the validation images; 0: before the first."""
    ended: Literal["whole", "patience", "time"]
    """`whole`: after all epochs; else which limit ended it early."""
    last: Score
    """On the test images, after the last epoch."""
    best: Score
    """On the test images, after the best epoch by the validation images."""
    kept: KeptWeights = "last"
    """Which weights stayed; `start`: those from before, because training broke the network."""


class RunResult(Record):
    """The content of `result.json`."""

    schema_version: int = SCHEMA_VERSION
    command: str | None
    """The command line, if there was one."""
    config: RunConfig
    environment: Environment
    engine_version: str = ""
    """Of what latency was measured in; empty in the results of versions that did not record it."""
    class_names: tuple[str, ...]
    kept_classes: KeptClasses | None = None
    """The classes that the head was cut to; None: all."""
    task: Task
    """How the network's outputs are read."""
    concepts: str = ""
    """Names of the concept sources that filters were ranked with, without `auto`; empty in the
    results of versions that had no `auto`."""
    has_labels: bool
    """Whether the labels are true ones. If not, they are the original network's predictions, and
    accuracy is agreement with them."""
    notes: tuple[str, ...]
    """What to know of how images, labels and outputs were read, and of the original's accuracy."""
    plan_hash: str
    equivalence_error: float
    """Largest relative difference between the cut network and the original with the removed
    channels masked, on one batch of calibration images."""
    stages: tuple[StageResult, ...]
    groups: tuple[GroupResult, ...]
    splits: tuple[SplitResult, ...] = ()
    """The convolutions that became two, with the action `rank`."""
    dropped: tuple[DroppedResult, ...] = ()
    """The residual branches that were dropped, with the action `depth`."""
    frozen: tuple[FrozenResult, ...]
    size_trials: tuple[SizeTrial, ...] = ()
    """The sizes that were tried, if `plan.max_drop` asked for the smallest network."""
    refit: tuple[LayerRefit, ...]
    refit_check: RefitCheck | None = None
    """None if no kernel was to be re-estimated."""
    batchnorm_recalibration: BatchNormRecalibration | None
    """None if it was switched off, or the network has no batch norm."""
    distillation: Distillation | None
    """None without distillation."""
    finetuning: FinetuneResult | None
    """None without fine-tuning."""
    unreadable: tuple[str, ...] = ()
    """Image files that were left out because they can't be read."""
    requested_batch_size: int | None = None
    """The batch size that was requested, if it did not fit into memory."""

    def score(self, stage: Stage) -> Score | None:
        """Return the score of a stage in the last round; None if the run has no such stage."""
        return next((s.score for s in reversed(self.stages) if s.stage == stage), None)

    @property
    def sensitivity(self) -> Sensitivity:
        """The sensitivity curves of the groups that have one; see `GroupResult.sensitivity`."""
        return {group.name: group.sensitivity for group in self.groups if group.sensitivity}

    def sensitivity_rows(self) -> list[dict[str, str | int | float]]:
        """Return the sensitivity curves as rows that `pandas.DataFrame` takes."""
        return sensitivity_rows(self.sensitivity)

    @property
    def removed_text(self) -> str:
        """How many filters went, how many convolutions were split, and how many blocks dropped."""
        removed = sum(len(group.removed) for group in self.groups)
        filters = sum(group.filters for group in self.groups)
        texts = [f"{removed} of {filters} prunable filters removed"]
        if self.splits:
            texts.append(f"{_number_of(len(self.splits), 'convolution', 's')} split in two")
        if self.dropped:
            texts.append(f"{_number_of(len(self.dropped), 'residual branch', 'es')} dropped")
        return ", ".join(texts)

    @property
    def engine(self) -> str:
        """What latency was measured in, with its version."""
        return f"{ENGINE_TITLES[self.config.plan.engine]} {self.engine_version}".rstrip()

    @property
    def concept_sources(self) -> str:
        """Names of the concept sources that filters were ranked with."""
        return self.concepts or self.config.score.concepts

    @property
    def accuracy_name(self) -> str:
        """What `Score.metric` is called in tables and charts."""
        return self.task.accuracy_name if self.has_metric else "agreement"

    @property
    def has_metric(self) -> bool:
        """Whether scores are more than agreement with the original network."""
        return self.has_labels or bool(self.task.metric_name)

    @property
    def notices(self) -> tuple[str, ...]:
        """What to know before the network is deployed, a sentence or two each."""
        notices = (
            *self.notes,
            self._batch_size_notice(),
            self._refit_notice(),
            self._finetuning_notice(),
            transform_notice(self.config.model.name),
            latency_notice(
                self.stages[0].score,
                self.stages[-1].score,
                self.config.plan.round_to,
                engine=self.config.plan.engine,
                is_split=bool(self.splits),
            ),
        )
        return tuple(notice for notice in notices if notice)

    def _batch_size_notice(self) -> str:
        if self.requested_batch_size is None:
            return ""
        return (
            f"Batches of {self.requested_batch_size} images did not fit into memory: batches of "
            f"{self.config.data.batch_size} were used. Only batch-norm recalibration depends on "
            "the batch size, and only slightly."
        )

    def _refit_notice(self) -> str:
        check = self.refit_check
        if check is None or check.is_kept:
            return ""
        return (
            "The refit made the outputs on held-out calibration images worse (divergence "
            f"{check.divergence_refit:.3f} nats, {check.divergence_cut:.3f} before), so the "
            "kernels stayed as cut. More calibration images or refit.form = 'channel' may help."
        )

    def _finetuning_notice(self) -> str:
        finetuning = self.finetuning
        if finetuning is None or not finetuning.epochs:
            return ""
        before, last = finetuning.before_metric, finetuning.epochs[-1].validation
        if last is None or last >= before or finetuning.kept == "best":
            return ""
        unit = self.task.metric_unit
        loss = (
            f"{self.accuracy_name} on the validation images fell from "
            f"{metric_text(before, unit).removesuffix(' %')} to {metric_text(last, unit)}"
        )
        if finetuning.kept == "start":
            return (
                f"Fine-tuning broke the network ({loss}), so the weights from before it stayed. A "
                "smaller learning rate or more epochs may help."
            )
        return (
            f"Fine-tuning ended worse than it began: {loss}. Expect this where the original "
            "network was trained on these images; otherwise --keep best keeps the best epoch."
        )


def stage_title(stage: Stage, round_number: int) -> str:
    """Return what people call a stage."""
    return _TITLES[stage] if round_number == 1 else f"{_TITLES[stage]} (round {round_number})"


def latency_notice(
    before: Score,
    after: Score,
    round_to: int | None,
    *,
    engine: EngineName = "pytorch",
    is_split: bool = False,
) -> str:
    """Return what to try if latency fell by less than half of what the MACs did; else nothing.

    `round_to` is that of the plan, and `engine` what latency was measured in; `is_split` says
    whether convolutions were split in two. Falls of the MACs below `LEAST_FALL` are lost in the
    noise of timing.
    """
    if before.macs == 0 or before.latency_ms == 0:
        return ""
    macs = 1 - after.macs / before.macs
    latency = 1 - after.latency_ms / before.latency_ms
    if macs < LEAST_FALL or not latency < macs / 2:
        return ""
    fell = f"fell by only {latency:.0%}" if round(latency, 2) > 0 else "did not fall"
    remedies = ["--actions channels (two thin layers take longer than one)"] if is_split else []
    remedies += [] if round_to and round_to % 8 == 0 else ["--round-to 16"]
    remedies.append("another batch size")
    remedies += ["--engine onnxruntime, if you deploy there"] if engine == "pytorch" else []
    return (
        f"Latency {fell} while the MACs fell by {macs:.0%} ({after.latency_batch} images in "
        f"{ENGINE_TITLES[engine]} on this machine). What can help: {', '.join(remedies)}, or -t "
        "latency=F, which plans by time."
    )


def merge_rounds(
    earlier: Sequence[GroupResult], later: Sequence[GroupResult]
) -> tuple[GroupResult, ...]:
    """Return the groups of the original network after another round.

    `later` numbers the filters as they are in the network that the round cut, `earlier` and the
    result as in the original network.
    """
    later_by_name = {group.name: group for group in later}
    return tuple(
        _merge_group(group, later_by_name[group.name]) if group.name in later_by_name else group
        for group in earlier
    )


def _merge_group(earlier: GroupResult, later: GroupResult) -> GroupResult:
    kept = [number for number in range(earlier.filters) if number not in earlier.removed]
    scores = list(earlier.scores)
    for number, score in zip(kept, later.scores, strict=True):
        scores[number] = score
    removed = sorted([*earlier.removed, *(kept[number] for number in later.removed)])
    return earlier.model_copy(update={"removed": tuple(removed), "scores": tuple(scores)})


def read_result(folder: Path) -> RunResult:
    """Read the result in a run folder; raise `RunFolderError` if it is missing or damaged."""
    path = folder / RESULT
    text = read_bounded(path, TEXT, RunFolderError)
    return parse_record(RunResult, text, SCHEMA_VERSION, str(path))


def comparable(config: Section) -> dict[str, object]:
    """Return the values of a configuration by dotted key, without those that change no result."""
    flat: dict[str, object] = {}
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            flat.update({f"{section}.{key}": value for key, value in values.items()})
        else:
            flat[section] = values
    return {key: value for key, value in flat.items() if key not in IDLE_KEYS}


def check_same(
    place: str, config: Section, earlier_config: Section, free_keys: frozenset[str]
) -> None:
    """Raise `UsageError` if two configurations differ in a key that is not free to differ.

    `place` names what was made with `earlier_config`.
    """
    asked, earlier = comparable(config), comparable(earlier_config)
    for key in sorted((asked.keys() | earlier.keys()) - free_keys):
        if asked.get(key) != earlier.get(key):
            raise UsageError(
                f"{place} was made with {key} = {earlier.get(key)}, not {asked.get(key)}: resume "
                "it with that configuration, or choose another folder"
            )


def _number_of(count: int, noun: str, ending: str) -> str:
    return f"{count} {noun}{ending if count > 1 else ''}"
