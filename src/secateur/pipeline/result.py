"""What a run found: scores by stage, what went, and all that is needed to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from secateur.config import ReportSection, RunConfig, Section
from secateur.errors import RunFolderError, UsageError
from secateur.evaluation.evaluate import Score
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.outcome import BatchNormRecalibration, LayerRefit, RefitCheck, SizeTrial
from secateur.runtime.environment import Environment
from secateur.runtime.input_limits import TEXT, read_bounded
from secateur.runtime.schema import Record, parse_record
from secateur.training.distill import Distillation
from secateur.training.trainer import KEYS_FREE_ON_RESUME, KEYS_WITHOUT_EFFECT, Epoch

SCHEMA_VERSION = 3
RESULT = "result.json"
IDLE_KEYS = frozenset(
    [
        *(f"finetune.{name}" for name in KEYS_WITHOUT_EFFECT),
        *(f"report.{name}" for name in ReportSection.model_fields),
    ]
)
"""Keys of a configuration that change no result."""
FREE_KEYS = IDLE_KEYS | {"data.batch_size", *(f"finetune.{name}" for name in KEYS_FREE_ON_RESUME)}
"""Those that may differ where a run is resumed that has not come to its end."""
Stage = Literal["before", "cut", "refit", "distilled", "finetuned"]


class StageResult(Record):
    """The network after one step."""

    stage: Stage
    round: int = 1
    """Which cut it belongs to."""
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
    """By the criterion, in the order of the filters; higher stays. Of a filter that went in an
    earlier round the score that it had then."""


class FrozenResult(Record):
    """Filters that could not be cut."""

    name: str
    filters: int
    reason: str


Kept = Literal["last", "best", "start"]
COLLAPSE = 0.1
"""A fall of the top-1 fraction on the validation images that no honest training explains. Smaller
falls are common where the original network has seen these images: what it remembered of them goes
with training on others, while the test images gain."""


def has_collapsed(before: float, epochs: Sequence[Epoch]) -> bool:
    """Whether a training has left a network that is far worse than the one that came."""
    last = epochs[-1].validation if epochs else None
    return last is not None and last < before - COLLAPSE


class FinetuneResult(Record):
    """How fine-tuning went."""

    epochs: tuple[Epoch, ...]
    before_top1_fraction: float
    """Top-1 fraction on the validation images before the first epoch."""
    best_epoch: int
    """The first of the epochs that were best on the validation images; 0: before the first."""
    ended: Literal["whole", "patience", "time"]
    """Whether all epochs were trained, or why not."""
    last: Score
    """On the test images, after the last epoch."""
    best: Score
    """On the test images, after the best epoch by the validation images."""
    kept: Kept = "last"
    """The weights that stayed; `start`: those before training, since it has broken the network."""


class RunResult(Record):
    """A whole run."""

    schema_version: int = SCHEMA_VERSION
    command: str | None
    """The command line, where there was one."""
    config: RunConfig
    environment: Environment
    class_names: tuple[str, ...]
    plan_hash: str
    equivalence_error: float
    """Largest relative difference between the cut network and the original with the removed
    channels silenced, on one batch of calibration images."""
    stages: tuple[StageResult, ...]
    groups: tuple[GroupResult, ...]
    frozen: tuple[FrozenResult, ...]
    size_trials: tuple[SizeTrial, ...] = ()
    """The sizes that were tried where the run looked for the smallest network."""
    refit: tuple[LayerRefit, ...]
    refit_check: RefitCheck | None = None
    """None where no kernels were re-estimated."""
    batchnorm_recalibration: BatchNormRecalibration | None
    """None where no statistics were to be re-estimated, or there are none."""
    distillation: Distillation | None
    """None without polishing."""
    finetuning: FinetuneResult | None
    """None without fine-tuning."""
    unreadable: tuple[str, ...] = ()
    """Image files that were left out everywhere because they can't be read."""
    requested_batch_size: int | None = None
    """Images at a time that were asked for, where there was memory for fewer only."""

    def score(self, stage: Stage) -> Score | None:
        """The score of a stage, of the last round, if the run came to it."""
        return next((s.score for s in reversed(self.stages) if s.stage == stage), None)

    @property
    def notices(self) -> tuple[str, ...]:
        """What whoever ships the network has to know, a sentence or two each."""
        found = []
        if self.requested_batch_size is not None:
            found.append(
                f"Batches of {self.requested_batch_size} images take more memory than there was: "
                f"{self.config.data.batch_size} at a time were looked at. "
                "Only re-estimated norms depend on that, by little."
            )
        check, tuning = self.refit_check, self.finetuning
        if check is not None and not check.is_kept:
            found.append(
                "Re-estimated kernels made held-out calibration images worse (divergence "
                f"{check.divergence_refit:.3f} after {check.divergence_cut:.3f} nats): the network "
                "stayed as it was cut. More calibration images, or refit.form = 'channel', may "
                "help."
            )
        last = tuning.epochs[-1].validation if tuning is not None and tuning.epochs else None
        if tuning is not None and last is not None and last < tuning.before_top1_fraction:
            falls = (
                f"the validation images fell from {100 * tuning.before_top1_fraction:.2f} to "
                f"{100 * last:.2f} % top-1"
            )
            if tuning.kept == "start":
                found.append(
                    f"Fine-tuning has broken the network ({falls}): it stayed as it was before. A "
                    "smaller learning rate, or more epochs, may help."
                )
            elif tuning.kept == "last":
                found.append(
                    f"Fine-tuning ended worse than it began: {falls}. That is to be expected where "
                    "the original network had been trained on these images; if not, --keep best "
                    "keeps the best epoch."
                )
        return tuple(found)


def merge_rounds(
    earlier: Sequence[GroupResult], later: Sequence[GroupResult]
) -> tuple[GroupResult, ...]:
    """Groups of the original network, after a round that cut what the earlier ones had left.

    `later` numbers the filters as they are in the network that it cut.
    """
    by_name = {group.name: group for group in later}
    found = []
    for group in earlier:
        now = by_name.get(group.name)
        if now is not None:
            kept = [number for number in range(group.filters) if number not in group.removed]
            scores = list(group.scores)
            for number, score in zip(kept, now.scores, strict=True):
                scores[number] = score
            removed = sorted([*group.removed, *(kept[number] for number in now.removed)])
            group = group.model_copy(update={"removed": tuple(removed), "scores": tuple(scores)})
        found.append(group)
    return tuple(found)


def read_result(folder: Path) -> RunResult:
    """The result in a run folder; raises `RunFolderError` where it is missing or damaged."""
    path = folder / RESULT
    text = read_bounded(path, TEXT, RunFolderError)
    return parse_record(RunResult, text, SCHEMA_VERSION, str(path))


def comparable(config: Section) -> dict[str, object]:
    """The values of a configuration by dotted key, but those that change no result."""
    flat: dict[str, object] = {}
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            flat.update({f"{section}.{key}": value for key, value in values.items()})
        else:
            flat[section] = values
    return {key: value for key, value in flat.items() if key not in IDLE_KEYS}


def check_same(place: str, config: Section, found: Section, free: frozenset[str]) -> None:
    """Raises `UsageError` where two configurations differ in more than the values of `free` keys.

    `place` says where what was made with the one that was `found` lies.
    """
    asked, had = comparable(config), comparable(found)
    for key in sorted((asked.keys() | had.keys()) - free):
        if asked.get(key) != had.get(key):
            raise UsageError(
                f"{place} was made with {key} = {had.get(key)}, not {asked.get(key)}: resume it as "
                "it was begun, or choose another folder"
            )


@dataclass(frozen=True)
class Origin:
    """What has to be known of the unpruned network to cut it once more."""

    architecture: str | None
    """As `models.load` takes it; None where only the user can build it."""
    image_shape: tuple[int, int, int]
    """`(rgb, height, width)`."""
    prune_residual: bool = False
    exclude: tuple[str, ...] = ()

    def build_dependency_graph(self, model: nn.Module) -> DependencyGraph:
        """The dependency graph of the unpruned network, made as it was made for the plan."""
        example = torch.zeros(2, *self.image_shape)
        return build_dependency_graph(
            model, example, prune_residual=self.prune_residual, exclude=self.exclude
        )
