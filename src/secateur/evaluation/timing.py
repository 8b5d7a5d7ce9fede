"""Latency of networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.runtime.module_state import evaluating

LATENCY_BATCH = 16
"""Images in the batch that latency is measured with."""


LATENCY_RUNS = 11


def latency_ms(model: nn.Module, images: Tensor, batch: int = LATENCY_BATCH) -> float:
    """Median time of a forward pass of `batch` images, after two passes to warm up."""
    images = repeat_to_batch(images, batch)
    with evaluating(model), torch.inference_mode():
        times = [seconds(lambda: model(images)) for _ in range(LATENCY_RUNS + 2)]
    return 1e3 * statistics.median(times[2:])


def repeat_to_batch(images: Tensor, size: int) -> Tensor:
    """So many images: the given ones `[image, rgb, height, width]`, over and over."""
    return images.repeat(-(-size // len(images)), 1, 1, 1)[:size]


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes, until the accelerator is done with it, too."""
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
