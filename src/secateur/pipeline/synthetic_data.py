"""Runs without images, or with few: more are synthesised from the network's batch norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.config import RunConfig, TaskKind
from secateur.data import SYNTHETIC, DataSet, Images, LabelKind, NormalisedImages
from secateur.data.annotated import AnnotatedImages
from secateur.data.batch_reader import BatchReader
from secateur.data.in_memory import ImagesInMemory
from secateur.data.tensor_list import tensor_list
from secateur.models.evaluate import read_outputs
from secateur.models.examine import FIRST_IMAGES, examine_outputs, make_task
from secateur.models.labels import read_labels
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import UsageError
from secateur.training.synthetic_images import (
    FROM_COPIES,
    FROM_NOISE,
    black_and_white,
    copies,
    norms_with_statistics,
    start_images,
    synthesise,
)

STAGE = "synthetic images"
"""Title of the step that synthesises them."""
DEFAULT_COUNT = 256
"""Synthetic images, beside few real ones or alone."""
FEW_IMAGES = 128
"""So many, or fewer, are extended by synthetic ones by default, if they are small."""
LARGEST_EXTENDED = 64
"""Side in pixels up to which images are small."""
PICTURES = 4
"""Axes of a batch of pictures."""
PREDICTED = 32
"""Images whose labels are predicted at a time."""


def is_synthetic(config: RunConfig) -> bool:
    """Return whether a run has no images, and synthesises them."""
    return config.data.source == SYNTHETIC


def noise_images(
    count: int | None,
    shape: Sequence[int],
    normalise: Callable[[Tensor], Tensor] | None,
    *,
    seed: int,
) -> ImagesInMemory:
    """Return the noise that images are made of; see `start_images`.

    Raises `UsageError` if `shape` is not that of an image.
    """
    if len(shape) < 2 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise UsageError(
            f"input_shape={tuple(shape)} must be the shape of one image as the network takes it, "
            "such as (3, 224, 224)"
        )
    return ImagesInMemory(
        tensor_list(start_images(count or DEFAULT_COUNT, shape, normalise, seed=seed)), None
    )


def synthetic_images(
    model: nn.Module,
    noise: ImagesInMemory,
    normalise: Callable[[Tensor], Tensor] | None,
    run_context: RunContext,
) -> ImagesInMemory:
    """Return the images that are made of the noise. Raises `UsageError` without batch norms."""
    bounds = None if normalise is None else black_and_white(normalise)
    pixels = synthesise(model, noise.pixels[:], FROM_NOISE, bounds, progress=run_context.progress)
    run_context.lines.end_stage(STAGE, f"{len(pixels)}")
    return replace(noise, pixels=tensor_list(pixels))


def with_predicted_labels(
    images: ImagesInMemory,
    model: nn.Module,
    test_labels: Tensor,
    kind: TaskKind | Literal["auto"],
) -> ImagesInMemory:
    """Return images with what the network predicts as labels, in the form of those to test with.

    A network whose outputs are no classes predicts none: then they stay without labels.
    """
    pixels = images.pixels
    outputs = examine_outputs(model, pixels[:FIRST_IMAGES])
    labels, _ = read_labels(test_labels, outputs, kind)
    task = make_task(outputs, [labels], kind)
    if task.is_values:
        return images
    with torch.no_grad():
        predicted = [
            task.predict(read_outputs(model, pixels[chunk], task)).cpu()
            for chunk in torch.arange(len(pixels)).split(PREDICTED)
        ]
    return replace(images, labels=torch.cat(predicted))


def describe_synthetic(dataset: DataSet, images: int, *, is_tested: bool) -> DataSet:
    """Return the data set with a note that says what such images are worth."""
    note = (
        f"No images were given: {images} were synthesised from the network's batch-norm "
        "statistics, and filters were scored and kernels refitted with these. Where much is "
        "removed, a hundred real images without labels do better."
    )
    if is_tested:
        note += " Scores are on your test images."
    else:
        note += (
            " The scores, too, are agreement with the original network on synthesised images, "
            "which real ones may not confirm: score the pruned network on real images before you "
            "rely on it."
        )
    return replace(dataset, notes=(*dataset.notes, note))


def extended_by(
    calibration: Images, kind: LabelKind, model: nn.Module, config: RunConfig, example: Tensor
) -> int:
    """Return how many synthetic images are added to the calibration images; `example` is of these.

    None are where images are labelled by position, come with annotations or are no pictures, where
    the network keeps no statistics, and where they are synthetic already.
    """
    is_open = kind in ("classes", "none") and not isinstance(calibration, AnnotatedImages)
    if is_synthetic(config) or not is_open or example.ndim != PICTURES:
        return 0
    if not norms_with_statistics(model):
        return 0
    wanted, count = config.data.synthetic_images, len(calibration.labels)
    if wanted is not None:
        return wanted
    is_small = max(example.shape[2:]) <= LARGEST_EXTENDED
    return DEFAULT_COUNT if count <= FEW_IMAGES and is_small else 0


def extend(
    calibration: Images,
    count: int,
    model: nn.Module,
    config: RunConfig,
    reader: BatchReader,
) -> Images:
    """Return calibration images with `count` more, made of mirrored and shifted copies of them.

    Each copy has its image's labels. Images are copied one after the other, so that those held out
    by `split_calibration` show what others show, too: a fit to fewer images would cost more.
    """
    batches = list(reader.read(calibration))
    pixels = torch.cat([batch.images.cpu() for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    sources = torch.arange(count) % len(pixels)
    start = copies(pixels, sources, flip=config.distill.flip, seed=config.seed)
    bounds = pixels.amin((0, 2, 3))[:, None, None], pixels.amax((0, 2, 3))[:, None, None]
    synthetic = synthesise(model, start, FROM_COPIES, bounds, progress=reader.progress)
    return NormalisedImages(torch.cat([pixels, synthetic]), torch.cat([labels, labels[sources]]))


def steps_of_images(config: RunConfig, added: int) -> int:
    """Return how many steps all images together take, if `added` are added to real ones."""
    if is_synthetic(config):
        return FROM_NOISE.steps * (config.data.synthetic_images or DEFAULT_COUNT)
    return FROM_COPIES.steps * added


def describe_extension(count: int, added: int) -> str:
    """Return a note on the images that were added."""
    return (
        f"{count} calibration images are few: {added} more were synthesised from mirrored and "
        "shifted copies of them and the network's batch-norm statistics (data.synthetic_images)."
    )
