"""Images that come from Python: tensors in batches of any common form, with labels or without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from secateur.config.in_memory import data_section
from secateur.data.batch_forms import (
    Form,
    SeveralInputs,
    as_batch,
    as_batches,
    is_batch,
    labels_as_tensor,
    split_batch,
    tensor_of,
)
from secateur.data.preprocessing import Preprocessing
from secateur.data.tensor_list import TensorList, tensor_list
from secateur.runtime.errors import DataError
from secateur.runtime.packed_inputs import (
    Inputs,
    describe,
)

ImageBatches = Iterable[Any] | Dataset[Any]
"""Images as a `DataLoader`, a `Dataset`, a list or a generator yields them: in batches or one by
one, alone, as `(images, labels)`, or under the usual names (`IMAGE_NAMES`, `LABEL_NAMES`) in a
dict, a named tuple or another object. Where a network takes several inputs they come as
`((a, b), labels)`, `(a, b, labels)` or `(a, b)`, or under the names that its call gives them."""
TEST_EVERY, VALIDATION_EVERY = 5, 10
"""Without test images every n-th image is held out for the scores, and every n-th of the others for
choices on validation images."""


@dataclass(frozen=True, eq=False)
class ImagesInMemory:
    """Images as the network takes them."""

    pixels: TensorList
    """Read as float32 `[image, …]`; held in the tensors that they came in, as uint8 if they are."""
    labels: Shaped[Tensor, "image *label"] | None
    """As they were passed; see `models.labels`."""
    is_from_front: bool = False
    """Whether they came in the order of an iterable, which may be sorted by class."""
    inputs: Inputs | None = None
    """What the pixels hold, if the network takes several inputs."""

    def take(self, chosen: Bool[Tensor, "image"]) -> ImagesInMemory:
        """Return the images where `chosen` is true."""
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, pixels=self.pixels.take(chosen), labels=labels)


@dataclass(frozen=True, eq=False)
class Parts:
    """Images to score filters with, to choose with, and to test with."""

    score: ImagesInMemory
    validation: ImagesInMemory
    test: ImagesInMemory

    @property
    def has_labels(self) -> bool:
        """Whether all images came with labels."""
        return self.score.labels is not None and self.test.labels is not None


def split_images(images: ImagesInMemory, test: ImagesInMemory | None) -> Parts:
    """Return the images in three parts; raise `DataError` if there are too few.

    Without `test` a part of `images` is held out; see `TEST_EVERY`.
    """
    count = len(images.pixels)
    test_every = TEST_EVERY if test is None else count + 1
    if test is None:
        is_test = every_nth(TEST_EVERY, count)
        images, test = images.take(~is_test), images.take(is_test)
    is_validation = every_nth(VALIDATION_EVERY, len(images.pixels))
    if not len(test.pixels) or not is_validation.any():
        least = next(
            n for n in itertools.count(VALIDATION_EVERY) if n - n // test_every >= VALIDATION_EVERY
        )
        raise DataError(f"{count} images are too few: give at least {least}")
    return Parts(images.take(~is_validation), images.take(is_validation), test)


def normaliser(
    tables: Mapping[str, Any], settings: Mapping[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """Return what makes a network's input of uint8 pictures; None if nobody has said that.

    For the arguments see `config_in_memory`.
    """
    section = data_section(tables, settings)
    if section.mean is None or section.std is None:
        return None
    order, value_range = section.channel_order or "rgb", section.value_range or 1
    side = 1  # nothing is resized
    return Preprocessing(
        side, side, section.mean, section.std, channel_order=order, value_range=value_range
    ).normalise


def every_nth(step: int, count: int) -> Tensor:
    """Return for each of `count` images whether it is the last of `step` in a row."""
    return torch.arange(count) % step == step - 1


def read_images(
    source: ImageBatches, form: Form, name: str, *, most: int | None = None, seed: int = 0
) -> ImagesInMemory:
    """Return at most `most` images, and their labels if each batch has them.

    Of a larger `Dataset` it is a random sample, in the order of the data set; of any other iterable
    the first images. Raises `DataError`, whose message calls the images `name`.
    """
    blocks: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    inputs: Inputs | None = None
    for batch in read_batches(source, form, name, most=most, seed=seed):
        blocks.extend(batch.pixels.blocks)
        inputs = batch.inputs
        if batch.labels is not None:
            labels.append(batch.labels)
        count += len(batch.pixels)
        if most is not None and count >= most:
            break
    if not blocks:
        raise DataError(f"{name}: there are none (a generator can be read only once)")
    if labels and len(labels) < len(blocks):
        raise DataError(f"{name}: some come with labels and some without")
    shapes = sorted({tuple(part.shape[1:]) for part in labels})
    if len(shapes) > 1:
        raise DataError(
            f"{name}: labels {list(shapes[0])} and {list(shapes[-1])} of one image each: all must "
            "have one form"
        )
    return ImagesInMemory(
        tensor_list(blocks, _convert(blocks[0], form)).take(slice(most)),
        torch.cat(labels)[:most] if labels else None,
        is_from_front=not _is_map_style(source),
        inputs=inputs,
    )


def read_batches(
    source: ImageBatches, form: Form, name: str, *, most: int | None = None, seed: int = 0
) -> Iterator[ImagesInMemory]:
    """Yield images `[image, channel, …]` of one size, with labels or None.

    Several inputs of a network are packed into one tensor. Of a `Dataset` of more than `most` items
    only a random sample is read.
    """
    shape: torch.Size | None = None
    dtype: torch.dtype | None = None
    inputs: Inputs | None = None
    for batch in _items(source, form, name, most, seed):
        raw_images, raw_labels = split_batch(batch, form, name)
        is_single = batch is not source
        labels = None if raw_labels is None else labels_as_tensor(raw_labels, name)
        if isinstance(raw_images, SeveralInputs):
            tensors = [tensor_of(part, form, name) for part in raw_images.parts]
            tensors, is_one = as_batches(tensors, labels, form, name, is_single=is_single)
            shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
            its_inputs = Inputs(shapes, raw_images.passing, raw_images.names)
            if inputs is not None and its_inputs != inputs:
                raise DataError(
                    f"{name}: inputs {describe(inputs.shapes)} and {describe(shapes)} of one image "
                    "each: all must have one size"
                )
            inputs = its_inputs
            images = inputs.pack(tensors)
        else:
            images, is_one = as_batch(
                tensor_of(raw_images, form, name), labels, form, name, is_single=is_single
            )
        if shape is not None and images.shape[1:] != shape:
            raise DataError(
                f"{name}: tensors {list(shape)} and {list(images.shape[1:])} of one image each: "
                "all must have one size"
            )
        if dtype not in (None, images.dtype):
            raise DataError(f"{name}: some are {dtype}, others {images.dtype}: all must be alike")
        shape, dtype = images.shape[1:], images.dtype
        convert = _convert(images, form)
        if convert is not None and convert(images[:1]).shape[1:] != shape:
            raise DataError(
                f"{name} {list(images.shape)}: data.mean and data.std need a value for each channel"
            )
        if labels is not None:
            is_one_label = not labels.ndim or (len(images) == 1 and len(labels) != 1)
            if is_one_label or (is_one and labels.ndim > 1):
                labels = labels[None]  # of a single image
            if len(labels) != len(images):
                raise DataError(f"{name}: {len(images)} images with {len(labels)} labels")
        yield ImagesInMemory(tensor_list(images, convert), labels, inputs=inputs)


def _convert(images: Tensor, form: Form) -> Callable[[Tensor], Tensor] | None:
    """Return what makes floats of images; None if they are floats."""
    return form.normalise if images.dtype == torch.uint8 else None


def _items(source: Any, form: Form, name: str, most: int | None, seed: int) -> Iterator[Any]:
    """Yield what a source holds, batch by batch or image by image."""
    if isinstance(source, str | Path):
        raise DataError(
            f"{name}: {str(source)!r} is a text: pass tensors, a DataLoader or a Dataset; the "
            f"command line reads folders: secateur prune --data folder:{source}"
        )
    if _is_map_style(source):
        count = len(source)
        order: Iterable[int] = range(count)
        if most is not None and count > most:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(count, generator=generator)[:most].sort().values.tolist()
        for index in order:
            yield source[index]
    elif is_batch(source, form):
        yield source
    else:
        try:
            items = iter(source)
        except TypeError as error:
            raise DataError(
                f"{name}: {type(source).__name__} holds no batches: pass a tensor, a list of "
                "tensors, a DataLoader or a Dataset"
            ) from error
        yield from items


def _is_map_style(source: object) -> bool:
    """Return whether a source is read by index, as a `Dataset` of torch's or Hugging Face's."""
    if isinstance(source, IterableDataset | Tensor | np.ndarray | Mapping | Sequence):
        return False
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")
