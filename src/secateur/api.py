"""Prune from Python: a network and images in, a smaller network and its scores out."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from markupsafe import Markup
from torch import Tensor, nn

from secateur.config import BudgetLike, TaskKind
from secateur.data import Batch, DataSet
from secateur.data.in_memory import (
    ImageBatches,
    ImagesInMemory,
    read_batches,
)
from secateur.experiments import run as runs
from secateur.experiments.report.gallery import make_gallery
from secateur.experiments.report.page import score_rows, write_report
from secateur.experiments.run_folder import Origin
from secateur.graph.forward import inputs_of, with_forward, with_inputs, without_forward
from secateur.graph.module_state import device_of
from secateur.graph.network_graph import Forward
from secateur.graph.output_values import OutputPart
from secateur.graph.working_copy import like_original
from secateur.graph.wrappers import require_module, unwrapped
from secateur.models import evaluate as evaluation
from secateur.models import zoo
from secateur.models.examine import examine_outputs, make_task
from secateur.models.labels import read_labels
from secateur.models.metrics.by_name import MetricInputs, find_metric
from secateur.models.metrics.user_function import NetworkFunction, UserMetric
from secateur.models.outputs import with_logits
from secateur.models.score import Score
from secateur.pipeline import prune as pipeline
from secateur.pipeline.estimate import Estimate
from secateur.pipeline.estimate import estimate as expected_of
from secateur.pipeline.from_python import Asked, form_for, prepare
from secateur.pipeline.pruned import Pruned
from secateur.pipeline.result import RunResult
from secateur.pipeline.verdict import verdict
from secateur.pruning.plan import PruningPlan
from secateur.runtime.device import current_device
from secateur.runtime.errors import DataError
from secateur.runtime.kept_memory import kept_memory
from secateur.scoring.criteria import CriterionLike
from secateur.training.own_loss import LossFunction


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult:
    """A smaller network, what was removed, and the scores of every stage.

    Printing it shows the table of scores; a notebook shows it as HTML.
    """

    model: nn.Module
    """The pruned network, in evaluation mode, on the device of the original."""
    plan: PruningPlan
    """Which filters were removed."""
    scores: Mapping[str, Score]
    """By stage, as far as the run had it: `before`, `cut`, `refit`, `distilled`, `finetuned`.
    Without labels `metric` is agreement with the original network."""
    result: RunResult
    """Everything else: settings, filter scores, frozen groups, environment."""
    has_labels: bool
    """Whether accuracies are measured on labels, not on the original network's classes."""
    _original: nn.Module
    _dataset: DataSet
    _pruned: Pruned
    _shape: tuple[int, ...]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a run folder, whose report has no gallery, and return its path.

        `secateur.load(folder, architecture=model)` loads the network again, where `model` is the
        original with any weights; a `forward` must be passed to it again. `load_program(folder)`
        needs no code. Raises `RunFolderError` if the folder is not empty (see `overwrite`), and
        `WriteError`.
        """
        config = self.result.config
        origin = Origin(
            None,
            self._shape,
            config.plan.prune_residual,
            config.plan.exclude,
            inputs=inputs_of(self._original),
            kept_classes=self.result.kept_classes,
            reparameterized=config.model.reparameterize,
        )
        runs.save(Path(folder), self._pruned, origin, overwrite=overwrite)
        return Path(folder)

    @kept_memory()
    def report(self, path: str | Path = "report.html", *, images: int = 512) -> Path:
        """Write one HTML file: what was removed, and what filters respond to; return its path.

        `images` is how many calibration images the filters are dissected with; 0 shows no images.
        Raises `WriteError`.
        """
        config = self.result.config
        report_section = config.report.model_copy(update={"images": images})
        config = config.model_copy(update={"report": report_section})
        result = self.result.model_copy(update={"config": config})
        gallery = make_gallery(
            self._original,
            self._pruned.model,
            self._dataset,
            result,
            dependencies=self._pruned.dependencies,
        )
        write_report(result, Path(path), gallery)
        return Path(path)

    def __repr__(self) -> str:
        head, *rows = _table(self)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if column == 0 else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in (head, *rows)
        ]
        outcome = verdict(self.result)
        return "\n".join([_summary(self), *lines, outcome, _counts(self), *self.result.notices])

    def _repr_html_(self) -> str:
        head, *rows = _table(self)
        heads = Markup("").join(Markup("<th>{}</th>").format(text) for text in head)
        body = Markup("").join(
            Markup("<tr>{}</tr>").format(
                Markup("").join(Markup("<td>{}</td>").format(text) for text in row)
            )
            for row in rows
        )
        table = Markup(
            "<p>{}</p><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>"
        ).format(_summary(self), heads, body)
        notes = (verdict(self.result), _counts(self), *self.result.notices)
        return Markup("").join([table, *map(Markup("<p>{}</p>").format, notes)])


@kept_memory()
@torch.inference_mode(False)  # also where the caller has switched gradients off
@torch.enable_grad()
def prune(
    model: nn.Module,
    images: ImageBatches | None,
    *,
    target: BudgetLike = "macs=0.5",
    criterion: CriterionLike = "vote",
    concepts: str = "auto",
    test: ImageBatches | None = None,
    input_shape: Sequence[int] | None = None,
    forward: Forward | None = None,
    class_names: Sequence[str] = (),
    keep_classes: Sequence[str | int] = (),
    task: Literal["auto"] | TaskKind = "auto",
    outputs: Sequence[OutputPart] = (),
    metric: str | NetworkFunction = "auto",
    epochs: int = 0,
    loss: LossFunction | None = None,
    max_images: int = 2500,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> PruneResult:
    """Return a smaller copy of a network, on its device; `model` itself is not changed.

    Arguments:
        model: any network that takes images and returns tensors: logits `[image, class]`, a map of
            them, or whatever a detector or a regression returns.
        images: what the network takes, floats `[image, channel, height, width]` of one size (or
            signals, or volumes), in batches or one by one, with class numbers or without; see
            `ImageBatches`. They score the filters and refit the remaining kernels, and go to the
            network's device batch by batch. Pictures may be uint8 if the `settings` have
            `data.mean` and `data.std` of values from 0 to 1. Tensors and float32 or uint8 arrays,
            also those mapped from files, are not copied: leave them as they are until the result's
            `report` is written. None: they are synthesised from what the network's batch norms
            remember of its training images, for which `input_shape` is needed.
        target: the budget, the fraction to keep: `0.5` or `"50%"` of the MACs, `{"params": 0.5}`,
            `"latency=0.7"`; also of `filters` or `memory`.
        criterion, concepts: how filters are ranked, as `secateur models` lists them; a criterion
            may be a `Criterion`, or a function of a layer's kernels, one row a filter.
        test: images for the scores. By default every fifth of `images` is held out. Without labels
            the scores say how often the two networks agree.
        input_shape: without images the shape of one, such as `(3, 32, 32)`. They have mean 0 and
            deviation 1, or the range that `data.mean` and `data.std` in the `settings` say.
        forward: `forward(model, images)` returns the outputs that count, for networks that take
            or return anything else, such as `lambda model, images: model(images)[0]`.
        task: what the outputs mean; by default their shape and the labels tell. `segmentation`
            reads a map of class scores; `regression` compares outputs of any form as values.
        metric: how networks are scored: a name, as `secateur models` lists them, or a function of
            the network that returns a number; higher is better.
        outputs: with `regression` or `detection`, which parts of the outputs are compared and how;
            by default all of them, each by its relative squared error.
        class_names: for the report.
        keep_classes: classes that the pruned network knows, by name or number; by default all. The
            head is cut to their outputs, in the order of the original head, and images of other
            classes are left out: by their labels, or else by what the network predicts.
        epochs: fine-tuning on `images`, from the original's outputs and the labels, if any.
        loss: for fine-tuning, in place of the usual loss with the labels: `loss(output, labels)`
            takes what the network returns for a batch and the batch's labels, and returns a tensor
            of one number, a mean over the images. Its weight is `finetune.label_weight`.
        max_images: the most images to read: a random sample of a larger `Dataset`, the first of
            any other iterable.
        settings: any keys of a configuration: `{"plan.round_to": 8, "refit.layers": "consumers"}`.
        progress: whether to print the stages with their times to stderr, with bars where it is a
            terminal or a notebook with ipywidgets.

    Raises `DataError` if the images are not such tensors, `UsageError` or `UnknownName` for
    settings that don't exist, and `SecateurError` if the network can't be traced or pruned.

    >>> import secateur, torch
    >>> model = secateur.load_model("resnet20", num_classes=10)
    >>> images = torch.rand(200, 3, 32, 32)
    >>> pruned = secateur.prune(model, images, target=0.5)
    >>> pruned.scores["refit"].macs / pruned.scores["before"].macs <= 0.5
    True
    >>> pruned.model(images[:1]).shape
    torch.Size([1, 10])
    """
    model = unwrapped(model)
    asked = Asked(
        images=images,
        input_shape=input_shape,
        target=target,
        criterion=criterion,
        concepts=concepts,
        test=test,
        forward=forward,
        class_names=class_names,
        keep_classes=keep_classes,
        task=task,
        outputs=outputs,
        metric=metric,
        epochs=epochs,
        loss=loss,
        max_images=max_images,
        seed=seed,
        settings=settings or {},
        progress=progress,
    )
    original, dataset, config, run_context = prepare(model, asked)
    with current_device(device_of(original)):
        pruned = pipeline.prune(original, dataset, config, run_context=run_context)
    return PruneResult(
        model=like_original(without_forward(pruned.model), model).eval(),
        plan=pruned.plan,
        scores={stage.stage: stage.score for stage in pruned.result.stages},
        result=pruned.result,
        has_labels=dataset.has_labels,
        _original=original,
        _dataset=dataset,
        _pruned=pruned,
        _shape=tuple(dataset.train.originals(torch.zeros(1, dtype=torch.int64))[0].shape),
    )


@torch.inference_mode(False)
@torch.enable_grad()
def estimate(model: nn.Module, images: ImageBatches | None, **arguments: Any) -> Estimate:
    """Return how long `prune` with the same arguments would take here, and how much memory.

    The images are read, the network is traced and runs on a few of them; nothing is pruned. Raises
    what `prune` raises before it starts.

    >>> import secateur, torch
    >>> model = secateur.load_model("resnet20", num_classes=10)
    >>> expected = secateur.estimate(model, torch.rand(100, 3, 32, 32), target=0.5)
    >>> expected.total_seconds < 600
    True
    """
    bound = inspect.signature(prune).bind(model, images, **arguments)
    bound.apply_defaults()
    passed = bound.arguments
    model = unwrapped(passed.pop("model"))
    asked = Asked(**{**passed, "settings": passed["settings"] or {}})
    original, dataset, config, run_context = prepare(model, asked, is_estimate=True)
    no_report = config.report.model_copy(update={"images": 0})
    config = config.model_copy(update={"report": no_report})
    return expected_of(original, dataset, config, run_context)


@kept_memory()
def evaluate(
    model: nn.Module,
    images: ImageBatches,
    *,
    forward: Forward | None = None,
    task: Literal["auto"] | TaskKind = "auto",
    metric: str | NetworkFunction = "auto",
    batch_size: int = 100,
    known_ms: float | None = None,
) -> Score:
    """Return the score of `model` on labelled images, on its device and in evaluation mode.

    `images`, `forward`, `task` and `metric` are as for `prune`; images that come one by one are
    scored `batch_size` at a time. The network is timed unless `known_ms` says what a forward pass
    takes. Raises `DataError` if there are no labels or one lies outside the network's classes, and
    `UsageError` if the network can't be run on the images.
    """
    model = require_module(model)
    read_images = read_batches(images, form_for(model, forward), "images")
    in_memory = next(read_images, None)
    if in_memory is None:
        raise DataError("images: there are none (a generator can be read only once)")
    batches = _labelled_batches(itertools.chain([in_memory], read_images), batch_size)
    first = next(batches)
    network = with_inputs(with_forward(model, forward), in_memory.inputs)
    network = with_logits(network, first.images, task)
    outputs = examine_outputs(network, first.images)
    labels, _ = read_labels(first.labels, outputs, task)
    its_task = make_task(outputs, [labels], task)

    def read() -> Iterator[Batch]:
        for batch in itertools.chain([first], batches):
            labels, _ = read_labels(batch.labels, outputs, its_task.kind)
            yield replace(batch, labels=labels)

    scored_by = (
        find_metric(metric, MetricInputs(its_task))
        if isinstance(metric, str)
        else partial(UserMetric, metric)
    )
    with current_device(device_of(network)):
        return evaluation.evaluate(
            network, read(), task=its_task, metric=scored_by, known_ms=known_ms
        )


def _labelled_batches(images: Iterable[ImagesInMemory], batch_size: int) -> Iterator[Batch]:
    """Yield labelled batches as they come, but single images in batches of `batch_size`."""
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0

    def joined() -> Batch:
        indices = torch.arange(count - sum(map(len, pixels)), count)
        batch = Batch(torch.cat(pixels), torch.cat(labels), indices)
        pixels.clear()
        labels.clear()
        return batch

    for in_memory in images:
        if in_memory.labels is None:
            raise DataError(
                "images: there are no labels, which accuracy needs: yield pairs (images, labels)"
            )
        pixels.extend(in_memory.pixels.blocks)
        labels.append(in_memory.labels)
        count += len(in_memory.pixels)
        if len(in_memory.pixels) > 1 or len(pixels) >= batch_size:
            yield joined()
    if pixels:
        yield joined()


def _summary(result: PruneResult) -> str:
    config = result.result.config
    name = config.model.name.partition(":")[2]
    criterion = config.score.criterion.removeprefix(f"{zoo.IN_MEMORY}:")
    unit = "" if result.has_labels else " (no labels: agreement alone is known)"
    return (
        f"{name} pruned to {config.plan.target} by {criterion}: {result.result.removed_text}{unit}"
    )


def _counts(result: PruneResult) -> str:
    """Return how many images were used, and for what."""
    dataset = result._dataset
    score, validation, test = (
        len(part.labels) for part in (dataset.train, dataset.validation, dataset.test)
    )
    return f"images: {score} to score, {validation} to choose, {test} to test"


def _table(result: PruneResult) -> list[list[str]]:
    rows = score_rows(result.result)
    shown = [key for key in rows[0] if key not in ("seconds", "loss", "top-5 %")]
    return [shown, *([row[key] for key in shown] for row in rows)]


__all__ = ["Estimate", "ImageBatches", "PruneResult", "estimate", "evaluate", "prune"]
