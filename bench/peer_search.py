"""Torch-Pruning cut to a fraction of the MACs, and the gradients that two of its criteria need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import peer
from secateur.models.evaluate import count_macs

BY_GRADIENT = ("taylor", "hessian")
"""Criteria in `peer.CRITERIA` that need gradients."""
TRIALS = {True: 9, False: 5}
"""Number of ratios to try, with one ranking over all layers and with one a layer."""
LAYER_TRIALS = 6
"""Number of layer counts to try between two ratios."""
CLOSE_ENOUGH = 0.003
SHORTFALL = 0.005
"""Largest distance of a cut below the target."""
IMAGES_AT_A_TIME = 20
"""Images whose gradients are held in memory at a time."""


@dataclass(frozen=True)
class NearestCut:
    """The cut nearest to a fraction of the MACs."""

    model: nn.Module
    macs_left: float
    ratio: float
    raised: int
    """Number of the last layers that were pruned by the next larger ratio."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the cross entropy with the network's predicted classes, by parameter."""

    mean: dict[str, Tensor]
    squared: dict[str, Tensor]
    """Mean of the squared gradient over the images."""

    def of(self, criterion: str) -> dict[str, Tensor] | None:
        """Return what a criterion of `peer.CRITERIA` needs."""
        return {"taylor": self.mean, "hessian": self.squared}.get(criterion)


def gradients(model: nn.Module, batches: Iterable[Tensor]) -> Gradients:
    """Return the gradients on images `[image, rgb, height, width]`, without labels."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(state: dict[str, Tensor], image: Tensor) -> Tensor:
        logits = functional_call(model, state, (image[None],))
        return F.cross_entropy(logits, logits.detach().argmax(1))

    gradients_by_image = vmap(grad(loss), in_dims=(None, 0))
    mean, squared = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(2))
    count = 0
    for batch in batches:
        for images in batch.split(IMAGES_AT_A_TIME):
            for name, values in gradients_by_image(parameters, images).items():  # [image, …]
                mean[name] += values.sum(0)
                squared[name] += values.square().sum(0)
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
    gradients_by_name: Mapping[str, Tensor] | None = None,
) -> NearestCut:
    """Return the cut whose MACs are nearest to `fraction`, and not much below it.

    If every layer is pruned by the same ratio, all layers of a width change at once, which is
    coarse; between two such steps, as many of the last layers as fit take the larger ratio. Raises
    whatever Torch-Pruning raises.
    """
    macs = count_macs(model, image)
    assert settings.whole is not None
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in settings.whole
    ]
    best: NearestCut | None = None

    def left_at(ratio: float, raised: int = 0, larger: float = 0.0) -> float:
        nonlocal best
        ratios = dict.fromkeys(layers[len(layers) - raised :], larger)
        smaller = peer.cut(
            model, image, ratio, settings, ratios=ratios, gradients=gradients_by_name
        ).model
        left = count_macs(smaller, image) / macs
        fits = left >= fraction - SHORTFALL
        if fits and (best is None or abs(left - fraction) < abs(best.macs_left - fraction)):
            best = NearestCut(smaller, left, ratio, raised)
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
    return best or NearestCut(model, 1.0, 0.0, 0)


def _place(above: float, below: float, fraction: float, trial: int) -> float:
    """Return where to try next between two trials, as a fraction, by linear interpolation.

    Every third time it is halfway, because the remaining MACs may fall in one jump.
    """
    return 0.5 if trial % 3 == 2 else (above - fraction) / (above - below)


def _is_near(cut: NearestCut | None, fraction: float) -> bool:
    return cut is not None and abs(cut.macs_left - fraction) < CLOSE_ENOUGH
