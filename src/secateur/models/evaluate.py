"""A network's score: accuracy, loss, MACs, parameters and latency."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.data import Batch
from secateur.data.batches import check_labels
from secateur.graph.module_state import as_input, evaluating
from secateur.graph.wrappers import without_wrappers
from secateur.models.score import Score
from secateur.runtime import distributed
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.timing import LATENCY_BATCH, Rounds, interleaved_medians, repeat_to_batch

LATENCY_RUNS = 11
WARM_UP_RUNS = 2


def evaluate(model: nn.Module, batches: Iterable[Batch], *, known_ms: float | None = None) -> Score:
    """Return the score of `model`, on its device and in evaluation mode, on all batches.

    The network is timed unless `known_ms` says what a forward pass takes. Each process passes its
    shard of the batches (`distributed.shard`) and gets the score on all of them, with the main
    process's latency. With fewer than five classes top-5 counts all of them. Raises `DataError`
    if a label lies outside the network's classes.
    """
    correct = torch.zeros(2, dtype=torch.int64)
    losses: list[float] = []
    count = 0
    example: Tensor | None = None

    def measure() -> tuple[int, float]:
        assert example is not None
        macs = count_macs(without_wrappers(model), example[:1])
        return macs, latency_ms(model, example) if known_ms is None else known_ms

    with torch.inference_mode():
        for batch in batches:
            logits = compute_logits(model, batch.images)
            labels = batch.labels.to(logits.device)
            example = as_input(model, batch.images) if example is None else example
            check_labels(batch.labels, logits.shape[1])
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = ranked == labels[:, None]
            correct += torch.stack([hits[:, 0].sum(), hits.sum()]).cpu()
            losses.append(float(F.cross_entropy(logits, labels, reduction="sum")))
            count += len(batch.labels)
    distributed.all_reduce_sum([correct])
    total: int = sum(distributed.all_gather(count))
    loss = math.fsum(distributed.gather_shards(losses))
    if not total:
        raise DataError("there are no images to score")
    macs, time_ms = distributed.on_main_process(measure)
    return Score(
        top1_fraction=int(correct[0]) / total,
        top5_fraction=int(correct[1]) / total,
        loss=loss / total,
        images=total,
        macs=macs,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        latency_ms=time_ms,
    )


def compute_logits(model: nn.Module, images: Tensor) -> Float[Tensor, "image class"]:
    """Return the network's logits, computed on its device and in evaluation mode.

    Raises `UsageError` where the network fails or returns anything else.
    """
    images = as_input(model, images)
    try:
        with evaluating(model):
            logits: object = model(images)
    except Exception as error:
        if explain(error) is not None:  # the machine's fault, not the network's
            raise
        shape, words = list(images.shape), " ".join(str(error).split())
        raise UsageError(f"the network can't be run on images {shape}: {words}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"the network must return logits [image, class]; it returns {what}")
    return logits


def predict_classes(model: nn.Module, images: Tensor, batch_size: int) -> Int[Tensor, "image"]:
    """Return the network's own class of each image."""
    with torch.no_grad():
        batches = images.split(batch_size)
        return torch.cat([compute_logits(model, batch).argmax(1) for batch in batches])


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
        compute_logits(model, image)
    return int(counter.get_total_flops()) // 2
