"""Torch-Pruning cut to a share of the MACs, and the gradients that two of its criteria ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import peer
from secateur.evaluation.evaluate import count_macs

BY_GRADIENT = ("taylor", "hessian")
"""Those of `peer.CRITERIA` that look at gradients."""
TRIALS = {True: 9, False: 5}
"""How many ratios are tried where one ranking goes over all layers, and where each has its own."""
LAYER_TRIALS = 6
"""How many numbers of layers are tried between two ratios."""
CLOSE_ENOUGH = 0.003
SHORTFALL = 0.005
"""How far below the target a cut may be."""
IMAGES_AT_A_TIME = 20
"""Whose gradients are held."""


@dataclass(frozen=True)
class Found:
    """The cut that comes nearest to a share of the MACs."""

    model: nn.Module
    macs_left: float
    ratio: float
    raised: int
    """How many of the last layers lost the next larger share, between two steps of the ratio."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of the cross entropy with the network's own predicted classes, by parameter."""

    mean: dict[str, Tensor]
    squared: dict[str, Tensor]
    """Mean over the images of the squared gradient."""

    def of(self, criterion: str) -> dict[str, Tensor] | None:
        """What a criterion of `peer.CRITERIA` looks at."""
        return {"taylor": self.mean, "hessian": self.squared}.get(criterion)


def gradients(model: nn.Module, batches: Iterable[Tensor]) -> Gradients:
    """The gradients on images `[image, rgb, height, width]`, in evaluation mode; no label."""
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(state: dict[str, Tensor], image: Tensor) -> Tensor:
        logits = functional_call(model, state, (image[None],))
        return F.cross_entropy(logits, logits.detach().argmax(1))

    each = vmap(grad(loss), in_dims=(None, 0))
    mean, squared = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    count = 0
    for batch in batches:
        for images in batch.split(IMAGES_AT_A_TIME):
            for name, found in each(parameters, images).items():  # [image, …]
                mean[name] += found.sum(0)
                squared[name] += found.square().sum(0)
            count += len(images)
    for name in parameters:
        mean[name] /= count
        squared[name] /= count
    return Gradients(mean, squared)


def cut_to(
    model: nn.Module,
    image: Tensor,
    settings: peer.Settings,
    fraction: float,
    found: Mapping[str, Tensor] | None = None,
) -> Found:
    """The cut that leaves as near to `fraction` of the MACs as may be, and not much less.

    Where every layer loses as much, all layers of a width take a step at once, which is coarse;
    between two such steps the last layers, as many as fit, take the larger share. `found` are the
    gradients. Raises whatever Torch-Pruning raises.
    """
    macs = count_macs(model, image)
    assert settings.whole is not None
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in settings.whole
    ]
    best: Found | None = None

    def left_at(ratio: float, raised: int = 0, larger: float = 0.0) -> float:
        nonlocal best
        ratios = dict.fromkeys(layers[len(layers) - raised :], larger)
        smaller = peer.cut(model, image, ratio, settings, ratios=ratios, gradients=found).model
        left = count_macs(smaller, image) / macs
        fits = left >= fraction - SHORTFALL
        if fits and (best is None or abs(left - fraction) < abs(best.macs_left - fraction)):
            best = Found(smaller, left, ratio, raised)
        return left

    low, high, above, below = 0.0, 1.0, 1.0, 0.0
    for trial in range(TRIALS[settings.is_global]):
        ratio = low + (high - low) * _place(above, below, fraction, trial)
        left = left_at(ratio)
        if left > fraction:
            low, above = ratio, left
        else:
            high, below = ratio, left
        if _is_near(best, fraction):
            break
    few, many = 0, 0 if settings.is_global else len(layers)
    for trial in range(LAYER_TRIALS):
        raised = few + round((many - few) * _place(above, below, fraction, trial))
        if raised in (few, many) or _is_near(best, fraction):
            break
        left = left_at(low, raised, high)
        if left > fraction:
            few, above = raised, left
        else:
            many, below = raised, left
    return best or Found(model, 1.0, 0.0, 0)


def _place(above: float, below: float, fraction: float, trial: int) -> float:
    """Where between two trials to look next, as a share: on the line between what they leave.

    Every third time it is halfway, as what is left may fall in one jump.
    """
    return 0.5 if trial % 3 == 2 else (above - fraction) / (above - below)


def _is_near(found: Found | None, fraction: float) -> bool:
    return found is not None and abs(found.macs_left - fraction) < CLOSE_ENOUGH
