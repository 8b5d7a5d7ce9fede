"""Images synthesised from a network alone: its batch norms remember what it was trained on.

Each batch norm keeps the mean and the variance that its channels had over the training images.
Pixels are changed by gradient descent until a batch of images has the same means and variances in
every layer (ZeroQ, arXiv 2001.00281; DeepInversion, arXiv 1912.08795).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from secateur.graph.module_state import device_of, evaluating
from secateur.models.examine import run_network
from secateur.runtime.errors import UsageError
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.runtime.torch_internals import BatchNorm

STEPS = 100
"""Steps of Adam on each batch of images."""
LEARNING_RATE = 0.1
"""Of Adam at the first step, in standard deviations of the pixels; it falls to 0 as a cosine."""
MEAN, DEVIATION = 0.45, 0.25
"""Of the values from 0 to 1 in photographs."""
GREY = 3.0
"""Deviation of the grey in the noise, over that of each colour by itself."""
MOST_IMAGES, FEWEST_IMAGES, BATCH_POSITIONS = 128, 16, 2**21
"""Images of a batch: at most, at least, and how many pixels they have together."""


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


def synthesise(
    model: nn.Module,
    start: Float[Tensor, "image channel *position"],
    normalise: Callable[[Tensor], Tensor] | None = None,
    *,
    progress: ProgressCallback = no_progress,
) -> Float[Tensor, "image channel *position"]:
    """Return images for which the inputs of all batch norms have the statistics that these keep.

    They are made of `start` on the network's device, batch by batch; see `start_images` for
    `normalise`, with which pixels stay between black and white. The network is not changed. Raises
    `UsageError` if it has no batch norms that keep statistics.
    """
    if not _norms(model):
        raise UsageError(
            "images can be synthesised only from the statistics of batch norms, and the network "
            "keeps none: give images, at least 10, if need be of another source"
        )
    size = BATCH_POSITIONS // max(1, start[0, 0].numel())
    batches = start.split(min(MOST_IMAGES, max(FEWEST_IMAGES, size)))
    steps = iter(progress(range(len(batches) * STEPS), "synthesising images", len(batches) * STEPS))
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        synthetic = [_synthesise_batch(model, batch, normalise, steps) for batch in batches]
    for _ in steps:  # ends the bar
        pass
    return torch.cat(synthetic)


def _synthesise_batch(
    model: nn.Module,
    start: Tensor,
    normalise: Callable[[Tensor], Tensor] | None,
    steps: Iterator[int],
) -> Tensor:
    images = start.detach().to(device_of(model), copy=True).requires_grad_()
    bounds = None if normalise is None else _bounds(normalise, images)
    optimiser = torch.optim.Adam([images], LEARNING_RATE * float(start.std()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        next(steps)
        (images.grad,) = torch.autograd.grad(statistics_error(model, images), [images])
        optimiser.step()
        schedule.step()
        if bounds is not None:
            with torch.no_grad():
                images.clamp_(*bounds)
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


def _norms(model: nn.Module) -> list[BatchNorm]:
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

    hooks = [norm.register_forward_pre_hook(collect) for norm in _norms(model)]
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


def _bounds(normalise: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of black and white in an image as the network takes it."""
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    values = normalise(ends.contiguous()).to(images)
    return values.amin(0), values.amax(0)
