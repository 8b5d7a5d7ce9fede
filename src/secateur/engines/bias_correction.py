"""Correct biases before weights are rounded to int8: layers keep the mean of their outputs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from secateur.graph.module_state import evaluating

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
STEPS = 127.0
"""Steps of a scale from 0 to the largest weight of an output channel."""


def with_corrected_biases(
    network: nn.Module, batches: Sequence[Tensor], steps: float = STEPS
) -> nn.Module:
    """Return a copy of a network whose biases make up for weights that are rounded to int8.

    Rounding moves the mean of what a layer puts out, most in depthwise convolutions, whose channels
    have few weights. Here the `batches` of images are run through the network and, in each layer,
    through the error of its rounded weights; the mean for each output channel is added to its bias.
    Weights are rounded by output channel, to `steps` on each side of 0. As in Nagel et al.,
    *Data-Free Quantization Through Weight Equalization and Bias Correction*, ICCV 2019, section
    4.2, with the mean over images in place of one that is derived.
    """
    corrected = copy.deepcopy(network)
    layers = [
        layer
        for layer in corrected.modules()
        if isinstance(layer, LAYERS) and not is_parametrized(layer)
    ]
    means: dict[nn.Module, list[Tensor]] = defaultdict(list)
    handles = [
        layer.register_forward_hook(partial(_record, means[layer], _error_of(layer, steps)))
        for layer in layers
    ]
    with evaluating(corrected), torch.no_grad():
        for images in batches:
            corrected(images)
        for handle in handles:
            handle.remove()
        for layer in layers:
            if means[layer]:
                _add_to_bias(layer, torch.stack(means[layer]).mean(0))
    return corrected


def _error_of(layer: nn.Module, steps: float) -> nn.Module:
    """Return a layer with the errors of the rounded weights, and without a bias."""
    error = copy.deepcopy(layer)
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    largest = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    scale = largest.clamp_min(torch.finfo(weight.dtype).tiny) / steps
    error.weight = nn.Parameter(weight - scale * torch.round(weight / scale), requires_grad=False)
    error.bias = None  # type: ignore[assignment]
    return error


def _record(means: list[Tensor], error: nn.Module, layer: nn.Module, args: Any, _: Tensor) -> None:
    """Note the mean of the error for each output channel in one batch."""
    channels = -1 if isinstance(layer, nn.Linear) else 1
    means.append(error(args[0]).movedim(channels, 0).flatten(1).mean(1))


def _add_to_bias(layer: nn.Module, means: Tensor) -> None:
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    corrected = means if bias is None else bias + means
    layer.bias = nn.Parameter(corrected, requires_grad=False)
