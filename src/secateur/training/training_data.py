"""Put the images of a training together with how they are preprocessed and augmented."""

from __future__ import annotations

import os
from dataclasses import dataclass

from secateur.config import Crop, TrainingSection
from secateur.data import Images, NormalisedImages, TensorImages, Unreadable
from secateur.data.augmentation import LARGEST_SHIFTED, Augmentation
from secateur.data.images_with_objects import ImagesWithObjects
from secateur.data.masks import MaskedImages
from secateur.data.preprocessing import Preprocessing
from secateur.data.training_stream import TrainingStream
from secateur.models.task import SINGLE_LABEL, Task
from secateur.runtime import distributed
from secateur.runtime.errors import UsageError
from secateur.training.own_loss import OwnLoss

WORKERS_FOR_FILES = 4
"""Default number of processes that read image files, at most one per processor."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Images to train on."""

    images: Images
    preprocessing: Preprocessing
    unreadable: Unreadable | None = None
    """Records image files that can't be read, which are then skipped; None makes them an error."""
    task: Task = SINGLE_LABEL
    """What the labels and the networks' outputs mean."""
    own_loss: OwnLoss | None = None
    """The loss to train with, if it is not the task's."""


def training_stream(data: TrainingData, settings: TrainingSection, seed: int) -> TrainingStream:
    """Return the batches of this process, for every epoch."""
    return TrainingStream(
        data.images,
        data.preprocessing,
        _augmentation(settings, data),
        settings.batch_size,
        seed,
        shard=distributed.rank_and_world_size(),
        workers=_workers(settings, data.images),
        unreadable=data.unreadable,
    )


def _augmentation(settings: TrainingSection, data: TrainingData) -> Augmentation:
    """Return how training images are augmented; the default crop depends on their size.

    Images that come normalised keep their height and width, which need not be equal. By default
    images stay as they are where a change may change the numbers, pictures or objects that they are
    labelled with. Raises `UsageError` for augmentation that the images or what they come with can't
    take.
    """
    images = data.images
    if settings.randaugment and isinstance(images, MaskedImages | ImagesWithObjects):
        raise UsageError("randaugment is for images with a class each, not with masks or objects")
    is_parted = settings.crop == "random_resized_crop"
    if (settings.randaugment or is_parted) and isinstance(images, NormalisedImages):
        raise UsageError(
            "randaugment and crop = 'random_resized_crop' change images in files, not tensors"
        )
    has_values = settings.label_weight > 0 and _trains_on_values(data)
    is_small = max(data.preprocessing.size) <= LARGEST_SHIFTED
    is_shifted = is_small or isinstance(data.images, NormalisedImages)
    default_crop: Crop = "random_crop" if is_shifted else "random_resized_crop"
    crop = settings.crop or ("none" if has_values else default_crop)
    flip = not has_values if settings.flip is None else settings.flip
    return Augmentation(crop, flip, settings.randaugment)


def _trains_on_values(data: TrainingData) -> bool:
    """Return whether labels are used that are no classes."""
    task = data.task
    is_used = task.has_loss if data.own_loss is None else task.has_labels
    return is_used and task.is_values


def _workers(settings: TrainingSection, images: Images) -> int:
    if settings.workers is not None:
        return settings.workers
    if isinstance(images, TensorImages | NormalisedImages):
        return 0
    return min(WORKERS_FOR_FILES, os.cpu_count() or 1)
