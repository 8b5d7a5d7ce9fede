"""A network's score: accuracy, loss, MACs, parameters and latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.data import Batch
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.wrappers import require_module, without_wrappers
from secateur.models.score import Score
from secateur.models.task import (
    Labels,
    Logits,
    Task,
    cross_entropy,
    examine_outputs,
    make_task,
    predict,
    run_network,
)
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, NotFiniteError
from secateur.runtime.timing import LATENCY_BATCH, Rounds, interleaved_medians, repeat_to_batch

LATENCY_RUNS = 11
WARM_UP_RUNS = 2
TOP = 5
"""Classes that `Score.top5_fraction` looks at."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network predicts of a list of images; of this process's shard of them."""

    classes: Labels
    """By `Batch.indices`; -1 for images that could not be read."""
    labels: Labels
    """The labels beside them."""
    class_count: int
    """How many classes the network distinguishes; 2 where each image has several labels."""

    def of_all_processes(self) -> tuple[Labels, Labels]:
        """Return the predictions and the labels of every image that could be read."""
        is_read = (self.classes >= 0).reshape(len(self.classes), -1).all(1)
        parts = distributed.all_gather((self.classes[is_read], self.labels[is_read]))
        parts = [part for part in parts if len(part[0])]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task | None = None,
    original: Predictions | None = None,
    known_ms: float | None = None,
) -> Score:
    """Return the score of `model`, on its device and in evaluation mode, on all batches.

    `task` says how outputs are read; by default the first batch tells. `original` are the original
    network's predictions of the same images. The network is timed unless `known_ms` says what a
    forward pass takes. Each process passes its shard of the batches (`distributed.shard`) and gets
    the score on all of them, with the main process's latency. Raises `DataError` if a label lies
    outside the network's classes.
    """
    score, _ = evaluate_and_predict(model, batches, task=task, original=original, known_ms=known_ms)
    return score


def evaluate_and_predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    task: Task | None = None,
    original: Predictions | None = None,
    known_ms: float | None = None,
    check: Callable[[Predictions], None] | None = None,
) -> tuple[Score, Predictions]:
    """Return the score of `model`, and what it predicts; see `evaluate`.

    `check` may raise an error in view of the predictions, before the network is timed.
    """
    model = require_module(model)
    tally = _Tally(task, original)
    with torch.inference_mode():
        for batch in batches:
            tally.add(model, batch)
    predictions = tally.predictions()
    if check is not None and len(predictions.classes):
        check(predictions)
    counts, loss, images, has_top5 = tally.sums()
    if not images:
        raise DataError("there are no images to score")

    def measure() -> tuple[int, float]:
        example = tally.example
        assert example is not None
        macs = count_macs(without_wrappers(model), example[:1])
        return macs, latency_ms(model, example) if known_ms is None else known_ms

    macs, time_ms = distributed.on_main_process(measure)
    score = Score(
        top1_fraction=counts.top1 / counts.decisions,
        top5_fraction=counts.top5 / counts.decisions if has_top5 else None,
        loss=loss / counts.decisions,
        images=images,
        macs=macs,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        latency_ms=time_ms,
        agreement_fraction=None if original is None else counts.agreed / counts.decisions,
        lost=None if original is None else counts.lost,
        gained=None if original is None else counts.gained,
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


class _Tally:
    """Adds up what is scored, batch by batch."""

    def __init__(self, task: Task | None, original: Predictions | None) -> None:
        self._task, self._original = task, original
        self._counts = torch.zeros(len(_Counts._fields), dtype=torch.int64)
        self._losses: list[float] = []
        self._images = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        """Indices, predictions and labels of each batch."""
        self.example: Tensor | None = None
        """The images of the first batch, on the network's device."""
        self.class_count = 0

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Score a batch; the first one tells the task, if it is not known."""
        if self._task is None:
            with torch.inference_mode(False):
                outputs = examine_outputs(model, batch.images)
            self._task = make_task(outputs, [batch.labels])
        logits = compute_logits(model, batch.images, self._task)
        is_undefined = logits.isnan().flatten(1).any(1)
        if bool(is_undefined.any()):
            count = int(is_undefined.sum())
            raise NotFiniteError(
                f"the network's outputs are NaN for {count} of {len(logits)} images"
            )
        labels = batch.labels.to(logits.device)
        loss = cross_entropy(logits, labels, reduction="sum")
        if self.example is None:
            self.example = as_input(model, batch.images)
        ranked = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
        self.class_count = logits.shape[-1]
        hits = ranked == labels[..., None]
        predicted = predict(logits)
        compared = [torch.zeros((), dtype=torch.int64)] * 3
        if self._original is not None:
            before, now = self._original.classes[batch.indices], predicted.cpu()
            was_right, is_right = before == batch.labels, now == batch.labels
            compared = [
                (before == now).sum(),
                (was_right & ~is_right).sum(),
                (is_right & ~was_right).sum(),
            ]
        top1, top5 = hits[..., 0].sum().cpu(), hits.sum().cpu()
        self._counts += torch.stack([torch.tensor(labels.numel()), top1, top5, *compared])
        self._losses.append(float(loss))
        self._images += len(labels)
        self._seen.append((batch.indices, predicted.cpu(), batch.labels))

    def sums(self) -> tuple[_Counts, float, int, bool]:
        """Return the counts, summed loss, number of images and whether there is a top 5, of all."""
        distributed.all_reduce_sum([self._counts])
        loss = math.fsum(distributed.gather_shards(self._losses))
        images = sum(distributed.all_gather(self._images))
        has_top5 = distributed.any_process(self.class_count > TOP)
        return _Counts(*self._counts.tolist()), loss, images, has_top5

    def predictions(self) -> Predictions:
        """Return the predictions of this process's images, in the order of their indices."""
        if not self._seen:
            nothing = torch.zeros(0, 1, dtype=torch.int64)
            return Predictions(nothing, nothing, self.class_count)
        indices, predicted, labels = map(torch.cat, zip(*self._seen, strict=True))
        classes = predicted.new_full((int(indices.max()) + 1, *predicted.shape[1:]), -1)
        beside = classes.clone()
        classes[indices], beside[indices] = predicted, labels.to(beside.dtype)
        return Predictions(classes, beside, self.class_count)


def compute_logits(model: nn.Module, images: Tensor, task: Task) -> Logits:
    """Return the network's logits, computed on its device and in evaluation mode.

    Raises `UsageError` where the network fails or returns anything else.
    """
    return task.read(run_network(model, images), len(images))


def predict_classes(model: nn.Module, images: Tensor, batch_size: int, task: Task) -> Labels:
    """Return the network's own class of each image, or its labels."""
    with torch.no_grad():
        batches = images.split(batch_size)
        return torch.cat([predict(compute_logits(model, batch, task)) for batch in batches])


def latency_ms(model: nn.Module, images: Tensor, batch: int = LATENCY_BATCH) -> float:
    """Return the median time in ms of a forward pass of `batch` images, in evaluation mode."""
    images = repeat_to_batch(images, batch)
    rounds = Rounds(LATENCY_RUNS, LATENCY_RUNS, warm_up=WARM_UP_RUNS)
    with evaluating(model), torch.inference_mode():
        return interleaved_medians({"model": lambda: model(images)}, rounds)["model"]


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Return the multiply-accumulates for one image `[1, rgb, height, width]`, by torch's count."""
    # In inference mode the counter fails in modules that take parameters, as parametrizations do.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(model, image)
    return int(counter.get_total_flops()) // 2
