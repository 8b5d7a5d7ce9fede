"""Images synthesised from a network alone: its batch norms remember what it was trained on.

Each batch norm keeps the mean and the variance that its channels had over the training images.
Pixels are changed by gradient descent until a batch of images has the same means and variances in
every layer (ZeroQ, arXiv 2001.00281; DeepInversion, arXiv 1912.08795).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from secateur.data.augmentation import Augmentation
from secateur.graph.module_state import device_of, evaluating
from secateur.models.examine import run_network
from secateur.runtime.errors import UsageError
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.torch_internals import BatchNorm

MEAN, DEVIATION = 0.45, 0.25
"""Of the values from 0 to 1 in photographs."""
GREY = 3.0
"""Deviation of the grey in the noise, over that of each colour by itself."""
MOST_IMAGES, FEWEST_IMAGES, BATCH_POSITIONS = 128, 16, 2**21
"""Images of a batch: at most, at least, and how many pixels they have together."""


@dataclass(frozen=True)
class Descent:
    """How pixels are changed, by Adam."""

    steps: int
    """On each batch of images."""
    learning_rate: float
    """At the first step, in standard deviations of the pixels; it falls to 0 as a cosine."""


MOST_SHIFT = 2
"""Pixels by which a batch is shifted at random before each step, as in DeepInversion: statistics
should not depend on where strides begin."""
FROM_NOISE = Descent(steps=100, learning_rate=0.1)
FROM_COPIES = Descent(steps=50, learning_rate=0.05)
"""Of real images, which are less far from the statistics."""


def start_images(
    count: int,
    shape: Sequence[int],
    normalise: Callable[[Tensor], Tensor] | None = None,
    *,
    seed: int,
) -> Float[Tensor, "image channel *position"]:
    """Return noise as smooth as photographs are, with the same power in each octave.

    `shape` is that of an image as the network takes it. `normalise` makes such an image of a uint8
    picture `[image, rgb, height, width]`; without it the mean is 0 and the deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)
    if normalise is None:
        return _smooth_noise(count, shape, generator)
    noise = _smooth_noise(count, (3, *shape[1:]), generator)
    return normalise(_as_pictures(noise))


def copies(
    images: Float[Tensor, "image channel height width"],
    sources: Int[Tensor, "copy"],
    *,
    flip: bool,
    seed: int,
) -> Float[Tensor, "copy channel height width"]:
    """Return randomly shifted copies of the images at `sources`, half of them mirrored if `flip`.

    Shifts are as in training; see `Augmentation`.
    """
    generator = torch.Generator().manual_seed(seed)
    augmentation = Augmentation("random_crop", flip)
    height, width = images.shape[2:]
    return augmentation.draw(len(sources), (height, width), generator).apply(images[sources])


def synthesise(
    model: nn.Module,
    start: Float[Tensor, "image channel *position"],
    descent: Descent,
    bounds: tuple[Tensor, Tensor] | None = None,
    *,
    progress: ProgressCallback = no_progress,
) -> Float[Tensor, "image channel *position"]:
    """Return images for which the inputs of all batch norms have the statistics that these keep.

    They are made of `start` on the network's device, batch by batch. `bounds` are the least and
    the largest value of each channel, `[channel, 1, …]`. The network is not changed. Raises
    `UsageError` if it has no batch norms that keep statistics.
    """
    if not norms_with_statistics(model):
        raise UsageError(
            "images can be synthesised only from the statistics of batch norms, and the network "
            "keeps none: give images, at least 10, if need be of another source"
        )
    size = BATCH_POSITIONS // max(1, start[0, 0].numel())
    batches = start.split(min(MOST_IMAGES, max(FEWEST_IMAGES, size)))
    total = len(batches) * descent.steps
    steps = iter(progress(range(total), "synthesising images", total))
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        synthetic = [_synthesise_batch(model, batch, descent, bounds, steps) for batch in batches]
    for _ in steps:  # ends the bar
        pass
    return torch.cat(synthetic)


def _synthesise_batch(
    model: nn.Module,
    start: Tensor,
    descent: Descent,
    bounds: tuple[Tensor, Tensor] | None,
    steps: Iterator[int],
) -> Tensor:
    images = start.detach().to(device_of(model), copy=True).requires_grad_()
    limits = None if bounds is None else [bound.to(images) for bound in bounds]
    optimiser = torch.optim.Adam([images], descent.learning_rate * float(start.std()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, descent.steps)
    generator = torch.Generator().manual_seed(0)
    axes = tuple(range(2, images.ndim))
    for _ in range(descent.steps):
        next(steps)
        shifts = torch.randint(-MOST_SHIFT, MOST_SHIFT + 1, (len(axes),), generator=generator)
        moved = images.roll(shifts.tolist(), axes)
        (images.grad,) = torch.autograd.grad(statistics_error(model, moved), [images])
        optimiser.step()
        schedule.step()
        if limits is not None:
            with torch.no_grad():
                images.clamp_(*limits)
    return images.detach().cpu()


def statistics_error(model: nn.Module, images: Tensor) -> Float[Tensor, ""]:
    """Return how far the inputs of the batch norms are from the statistics that these keep.

    It is the squared difference of the means, and that of the deviations, each over the kept
    variance, averaged over the channels of a batch norm and over all of these.
    """
    with _batch_norm_inputs(model) as inputs:
        run_network(model, images)
    errors = [_layer_error(norm, values) for norm, values in inputs]
    return torch.stack(errors).mean()


def _layer_error(norm: BatchNorm, values: Tensor) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    values = values.float().transpose(0, 1).flatten(1)  # [channel, position]
    kept = norm.running_var.float() + norm.eps
    means = (values.mean(1) - norm.running_mean).square()
    deviations = ((values.var(1, unbiased=False) + norm.eps).sqrt() - kept.sqrt()).square()
    return ((means + deviations) / kept).mean()


def norms_with_statistics(model: nn.Module) -> list[BatchNorm]:
    """Return the batch norms that keep statistics."""
    norms = (module for module in model.modules() if isinstance(module, BatchNorm))
    return [norm for norm in norms if norm.running_mean is not None]


@contextmanager
def _batch_norm_inputs(model: nn.Module) -> Iterator[list[tuple[BatchNorm, Tensor]]]:
    """Collect what every batch norm that keeps statistics gets, in a block."""
    inputs: list[tuple[BatchNorm, Tensor]] = []

    def collect(norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, BatchNorm)
        inputs.append((norm, arguments[0]))

    hooks = [norm.register_forward_pre_hook(collect) for norm in norms_with_statistics(model)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _smooth_noise(count: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return noise `[image, channel, …]` of mean 0 and deviation 1, alike in all channels."""
    channels, *sides = shape
    colours = torch.randn(count, channels, *sides, generator=generator)
    noise = colours + GREY * torch.randn(count, 1, *sides, generator=generator)
    if sides:
        axes = tuple(range(2, 2 + len(sides)))
        squares = torch.zeros(())
        for side in sides:
            squares = squares[..., None] + torch.fft.fftfreq(side).square()
        lowest = 1 / max(sides)
        amplitude = squares.sqrt().clamp_min(lowest) ** (-len(sides) / 2)  # 1 / f for pictures
        noise = torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * amplitude, dim=axes).real
    over = (0, *range(2, noise.ndim))
    return (noise - noise.mean(over, keepdim=True)) / noise.std(over, keepdim=True)


def _as_pictures(noise: Tensor) -> UInt8[Tensor, "image rgb height width"]:
    return ((MEAN + DEVIATION * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def black_and_white(normalise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of each channel `[channel, 1, 1]`."""
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    values = normalise(ends.contiguous())
    return values.amin(0), values.amax(0)
