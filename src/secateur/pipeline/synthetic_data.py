"""A run without images: calibration images are synthesised from the network's batch norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.config import RunConfig, TaskKind
from secateur.data import SYNTHETIC, DataSet
from secateur.data.in_memory import ImagesInMemory
from secateur.data.tensor_list import tensor_list
from secateur.models.evaluate import read_outputs
from secateur.models.examine import FIRST_IMAGES, examine_outputs, make_task
from secateur.models.labels import read_labels
from secateur.pipeline.run_context import RunContext
from secateur.runtime.errors import UsageError
from secateur.training.synthetic_images import start_images, synthesise

STAGE = "synthetic images"
"""Title of the step that synthesises them."""
PREDICTED = 32
"""Images whose labels are predicted at a time."""


def is_synthetic(config: RunConfig) -> bool:
    """Return whether a run has no images, and synthesises them."""
    return config.data.source == SYNTHETIC


def noise_images(
    count: int,
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
    return ImagesInMemory(tensor_list(start_images(count, shape, normalise, seed=seed)), None)


def synthetic_images(
    model: nn.Module,
    noise: ImagesInMemory,
    normalise: Callable[[Tensor], Tensor] | None,
    run_context: RunContext,
) -> ImagesInMemory:
    """Return the images that are made of the noise. Raises `UsageError` without batch norms."""
    pixels = synthesise(model, noise.pixels[:], normalise, progress=run_context.progress)
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
