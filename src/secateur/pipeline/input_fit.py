"""Whether a network takes the images: how many channels, and at which sizes it can be run."""

from __future__ import annotations

import torch
from torch import nn

from secateur.graph.module_state import device_of, evaluating
from secateur.runtime.error_messages import explain
from secateur.runtime.errors import UsageError
from secateur.runtime.seeding import forked_generators

SIZES = (28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 227, 256, 299, 320, 384, 448, 512)
"""Usual sides of images, tried if a network can't be run on those that come."""
COLOUR, GREY = 3, 1
"""Channels that image files are read with."""


def fit_channels(model: nn.Module, size: tuple[int, int]) -> int:
    """Return how many channels the network takes: 3, or 1 if it can't be run on 3.

    It is run on black images of a height and width. Raises `UsageError` if it can't be run on
    either; the message says with how many channels or at which sizes it can, if at any that are
    tried.
    """
    cause = _failure(model, COLOUR, size)
    if cause is None:
        return COLOUR
    if _failure(model, GREY, size) is None:
        return GREY
    channels = _first_channels(model)
    if channels == GREY:
        cause = _failure(model, GREY, size)
    sizes = [side for side in SIZES if _failure(model, channels, (side, side)) is None]
    if channels not in (COLOUR, GREY) and (sizes or _failure(model, channels, size) is None):
        raise UsageError(
            f"the network takes images with {channels} channels, but image files are read with 3 "
            "(or 1, grey): use secateur.prune from Python, which takes tensors"
        )
    raise UsageError(
        f"the network can't be run on images of {size[1]}×{size[0]} (data.image_size) with "
        f"{channels} {'channel' if channels == 1 else 'channels'}: "
        f"{_advice(model, channels, size, sizes)}{cause}"
    )


def _failure(model: nn.Module, channels: int, size: tuple[int, int]) -> str | None:
    """Return why the network can't be run on two black images, or None if it can."""
    images = torch.zeros(2, channels, *size, device=device_of(model))
    try:
        with evaluating(model), torch.no_grad(), forked_generators(images.device):
            output: object = model(images)
    except Exception as error:  # the network is the user's: it may raise anything
        if explain(error) is not None:  # the machine's fault, not the network's
            raise
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(output, torch.Tensor) and output.ndim > 1 and len(output) != len(images):
        return f"for {len(images)} images it returns {len(output)} rows"
    return None


def _first_channels(model: nn.Module) -> int:
    """Return the input channels of the network's first convolution; 3 if it has none."""
    channels = (layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    return next(channels, COLOUR)


def _advice(model: nn.Module, channels: int, size: tuple[int, int], sizes: list[int]) -> str:
    """Return at which sizes the network can be run; `sizes` are those of `SIZES`."""
    if not sizes:
        return ""
    least = min(size)
    if least < sizes[0] and sizes == [side for side in SIZES if side >= sizes[0]]:
        low, high = least, sizes[0]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if _failure(model, channels, (middle, middle)) else (low, middle)
            )
        return f"it needs at least {high}×{high}, so pass --image-size {high} or more. "
    options = " or ".join(map(str, sizes[:3]))
    return f"it can at --image-size {options}. "
