"""A network's score: accuracy, loss, MACs, parameters and latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.data import Batch
from secateur.data.images import IGNORED
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.wrappers import require_module, without_wrappers
from secateur.models.examine import examine_outputs, make_task, run_network
from secateur.models.metrics import Metric, MetricFactory
from secateur.models.score import Score
from secateur.models.task import SINGLE_LABEL, Labels, Reading, Task
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, NotFiniteError
from secateur.runtime.timing import LATENCY_BATCH, Rounds, batch_in_time, interleaved_medians

LATENCY_ROUNDS = Rounds(fewest=3, most=9, seconds=2.0, warm_up=1)
TOP = 5
"""Classes that `Score.top5_fraction` looks at."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network predicts of a list of images; of this process's shard of them."""

    classes: Labels
    """By `Batch.indices`: of each image, label or position, or the values that are compared."""
    labels: Labels
    """The labels beside them."""
    class_count: int
    """How many classes the network distinguishes; 2 where each image has several labels."""
    is_read: Bool[Tensor, "image"]
    """False for images that could not be read."""

    def of_all_processes(self) -> tuple[Labels, Labels]:
        """Return the predictions and the labels of every image that could be read."""
        parts = distributed.all_gather((self.classes[self.is_read], self.labels[self.is_read]))
        parts = [part for part in parts if len(part[0])]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task | None = None,
    metric: MetricFactory | None = None,
    original: Predictions | None = None,
    known_ms: float | None = None,
    latency_batch: int = LATENCY_BATCH,
) -> Score:
    """Return the score of `model`, on its device and in evaluation mode, on all batches.

    `task` says how outputs are read; by default the first batch tells. `metric` makes what is
    computed in place of the accuracy. `original` are the original network's predictions of the same
    images. The network is timed unless `known_ms` says what a forward pass of `latency_batch`
    images takes. Each process passes its shard of the batches (`distributed.shard`) and gets the
    score on all of them, with the main process's latency. Raises `DataError` if a label lies
    outside the network's classes.
    """
    score, _ = evaluate_and_predict(
        model,
        batches,
        task=task,
        metric=metric,
        original=original,
        known_ms=known_ms,
        latency_batch=latency_batch,
    )
    return score


def evaluate_and_predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task | None = None,
    metric: MetricFactory | None = None,
    original: Predictions | None = None,
    known_ms: float | None = None,
    latency_batch: int = LATENCY_BATCH,
    check: Callable[[Predictions], None] | None = None,
) -> tuple[Score, Predictions]:
    """Return the score of `model`, and what it predicts; see `evaluate`.

    `check` may raise an error in view of the predictions, before the network is timed.
    """
    model = require_module(model)
    tally = _Tally(task, None if metric is None else metric(), original)
    with torch.inference_mode():
        for batch in batches:
            tally.add(model, batch)
    predictions = tally.predictions()
    if check is not None and len(predictions.classes):
        check(predictions)
    sums = tally.sums()
    if not sums.images:
        raise DataError("there are no images to score")
    details = tally.figures()

    def measure() -> tuple[int, float, int]:
        example = tally.example
        assert example is not None
        macs = count_macs(without_wrappers(model), example[:1])
        if known_ms is not None:
            return macs, known_ms, latency_batch
        return macs, *latency_ms(model, example)

    macs, time_ms, timed_images = distributed.on_main_process(measure)
    main = next(iter(details), None)
    score = Score(
        metric=sums.accuracy if main is None else details.pop(main),
        top5_fraction=sums.top5,
        loss=sums.loss,
        images=sums.images,
        macs=macs,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        latency_ms=time_ms,
        agreement_fraction=sums.agreement,
        lost=sums.lost,
        gained=sums.gained,
        details=details,
        latency_batch=timed_images,
    )
    return score, predictions


class _Counts(NamedTuple):
    """Decisions, one for each image or each of its labels: all, right ones, and so on."""

    decisions: int
    top1: int
    top5: int
    agreed: int
    lost: int
    gained: int


@dataclass(frozen=True)
class _Sums:
    """What was added up, over all processes."""

    images: int
    accuracy: float
    top5: float | None
    loss: float | None
    agreement: float | None
    lost: int | None
    gained: int | None


class _Tally:
    """Adds up what is scored, batch by batch."""

    def __init__(
        self, task: Task | None, metric: Metric | None, original: Predictions | None
    ) -> None:
        self._task, self._metric, self._original = task, metric, original
        self._counts = torch.zeros(len(_Counts._fields), dtype=torch.int64)
        self._losses: list[float] = []
        self._images = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        """Indices, predictions and labels of each batch."""
        self._errors = torch.zeros(2, dtype=torch.float64)
        """Of values: their squared error and that of the original's values, over all images."""
        self.example: Tensor | None = None
        """The images of the first batch, on the network's device."""
        self.class_count = 0

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Score a batch; the first one tells the task, if it is not known."""
        if self._task is None:
            with torch.inference_mode(False):
                outputs = examine_outputs(model, batch.images)
            self._task = make_task(outputs, [batch.labels])
        task = self._task
        output = run_network(model, batch.images)
        reading = task.read(output, len(batch.images))
        is_undefined = reading.isnan().flatten(1).any(1)
        if bool(is_undefined.any()):
            count = int(is_undefined.sum())
            raise NotFiniteError(
                f"the network's outputs are NaN for {count} of {len(reading)} images"
            )
        if self.example is None:
            self.example = as_input(model, batch.images)
        if self._metric is not None:
            self._metric.update(model, output, batch)
        self._images += len(batch.images)
        if task.is_values:
            self._add_values(reading, task.read_labels(batch.labels, output), batch)
        else:
            self._add_classes(reading, task.read_labels(batch.labels, output), batch)

    def _add_classes(self, logits: Reading, labels: Labels, batch: Batch) -> None:
        assert self._task is not None
        predicted = self._task.predict(logits).cpu()
        if not self._task.has_labels:
            labels = predicted if self._original is None else self._original.classes[batch.indices]
        self._losses.append(float(self._task.loss(logits, labels.to(logits.device))))
        ranked = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
        self.class_count = logits.shape[-1]
        counts = labels != IGNORED
        hits = ranked.cpu() == labels[..., None]
        compared = [torch.zeros((), dtype=torch.int64)] * 3
        if self._original is not None:
            before = self._original.classes[batch.indices]
            was_right, is_right = before == labels, predicted == labels
            compared = [
                (before == predicted)[counts].sum(),
                (was_right & ~is_right).sum(),
                (is_right & ~was_right).sum(),
            ]
        self._counts += torch.stack([counts.sum(), hits[..., 0].sum(), hits.sum(), *compared])
        self._seen.append((batch.indices, predicted, labels))

    def _add_values(self, values: Reading, labels: Labels, batch: Batch) -> None:
        """Compare values with the original network's; without it they are those themselves."""
        assert self._task is not None
        actual = self._task.predict(values).cpu()
        expected = actual if self._original is None else self._original.classes[batch.indices]
        wanted = labels.cpu() if labels.shape == actual.shape else expected
        self._losses.append(float(self._task.loss(actual, wanted)))
        error = (actual - expected).double().square().mean(1).sum()
        self._errors += torch.stack([error, torch.tensor(float(len(actual)))])
        self._seen.append((batch.indices, actual, actual[:, :1]))

    def sums(self) -> _Sums:
        """Return what was added up, of all processes."""
        distributed.all_reduce_sum([self._counts, self._errors])
        total_loss = math.fsum(distributed.gather_shards(self._losses))
        images = sum(distributed.all_gather(self._images))
        has_top5 = distributed.any_process(self.class_count > TOP)
        counts = _Counts(*self._counts.tolist())
        task, is_known = self._task or SINGLE_LABEL, self._original is not None
        decisions = max(1, counts.decisions)
        is_map = task.kind == "segmentation"
        losses = max(1, images) if task.is_values or is_map else decisions
        loss = total_loss / losses if task.has_loss else None
        if task.is_values:
            error, count = self._errors.tolist()
            agreement = 1 - error / max(1, count)  # each value has unit variance
            known = agreement if is_known else None
            return _Sums(images, agreement, None, loss, known, None, None)
        return _Sums(
            images,
            counts.top1 / decisions,
            counts.top5 / decisions if has_top5 and not is_map else None,
            loss,
            counts.agreed / decisions if is_known else None,
            counts.lost if is_known else None,
            counts.gained if is_known else None,
        )

    def figures(self) -> dict[str, float]:
        """Return what the metric computes, of all processes; nothing without a metric."""
        if self._metric is None:
            return {}
        self._metric.merge()
        return self._metric.compute()

    def predictions(self) -> Predictions:
        """Return the predictions of this process's images, in the order of their indices."""
        if not self._seen:
            nothing = torch.zeros(0, 1, dtype=torch.int64)
            return Predictions(nothing, nothing, self.class_count, nothing[:, 0].bool())
        indices, predicted, labels = map(torch.cat, zip(*self._seen, strict=True))
        count = int(indices.max()) + 1
        classes = predicted.new_full((count, *predicted.shape[1:]), -1)
        beside = labels.new_full((count, *labels.shape[1:]), -1)
        classes[indices], beside[indices] = predicted, labels
        is_read = torch.zeros(count, dtype=torch.bool)
        is_read[indices] = True
        return Predictions(classes, beside, self.class_count, is_read)


def read_outputs(model: nn.Module, images: Tensor, task: Task) -> Reading:
    """Return the network's logits or values, computed on its device and in evaluation mode.

    Raises `UsageError` where the network fails or returns anything else.
    """
    return task.read(run_network(model, images), len(images))


def latency_ms(model: nn.Module, images: Tensor) -> tuple[float, int]:
    """Return the median time in ms of a forward pass in evaluation mode, and its batch size."""
    with evaluating(model), torch.inference_mode():
        batch = batch_in_time(model, images)
        medians = interleaved_medians({"model": lambda: model(batch)}, LATENCY_ROUNDS)
    return medians["model"], len(batch)


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-accumulates for one image `[1, rgb, height, width]`, by torch's count."""
    # In inference mode the counter fails in modules that take parameters, as parametrizations do.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(model, image)
    return int(counter.get_total_flops()) // 2
