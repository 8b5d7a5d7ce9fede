"""The latency of one network in an engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.engines.engine import Engine
from secateur.graph.module_state import evaluating
from secateur.models.evaluate import LATENCY_ROUNDS, latency_ms
from secateur.runtime.timing import batch_in_time, interleaved_medians


def latency_in(engine: Engine, model: nn.Module, images: Tensor) -> tuple[float, int]:
    """Return the median time in ms of a forward pass in evaluation mode, and its batch size.

    `images` are `[image, channel, …]`. Raises the errors of `Engine.prepare`.
    """
    if engine.name == "pytorch":
        return latency_ms(model, images)
    with evaluating(model), torch.inference_mode():
        batch = batch_in_time(model, images)
        medians = interleaved_medians({"model": engine.prepare(model, batch)}, LATENCY_ROUNDS)
    return medians["model"], len(batch)
