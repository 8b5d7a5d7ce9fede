"""Data sets by name, and their train, validation and test images.

Calibration images are drawn from `train`, and fine-tuning reads it; `validation` is held out of it
and may be used to choose settings; `test` is for final scores only.

- `cifar`, `imagenet`, `fashion_mnist`, `cub`, `digits`: readers of these data sets
- `folder`, `hugging_face`: readers of your own images
- `folder_layout`, `image_files`: what a folder holds: parts, classes, images and other files
- `in_memory`, `batch_forms`: tensors that come from Python
- `images`, `preprocessing`, `batches`: from stored images to normalised batches
- `tensor_list`: tensors of which some are chosen without copying them
- `coco`, `yolo`, `objects`, `images_with_objects`: images with objects
- `unlabelled`, `arrays`: images without labels; arrays
- `segmentation`, `mask_layout`, `masks`, `value_names`: images with masks
- `annotated`, `concept_masks`: images with annotated regions
- `splits`: held-out and calibration images
- `kept_classes`: some of the classes, and the images that show them
- `augmentation`, `training_stream`: batches to train on
- `unreadable`: damaged image files
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from secateur.data.arrays import read_arrays
from secateur.data.batches import Batch, batches
from secateur.data.cifar import read_cifar10, read_cifar100
from secateur.data.coco import read_coco
from secateur.data.cub import read_cub
from secateur.data.digits import read_digits
from secateur.data.fashion_mnist import read_fashion_mnist
from secateur.data.folder import read_folder
from secateur.data.folder_layout import is_archive
from secateur.data.hugging_face import read_hugging_face
from secateur.data.imagenet import read_imagenet, read_imagenette
from secateur.data.images import FileImages, Images, NormalisedImages, TensorImages, stored_size
from secateur.data.kept_classes import KeptClasses, images_of_classes
from secateur.data.segmentation import KIND as SEGMENTATION
from secateur.data.segmentation import read_segmentation
from secateur.data.splits import LabelKind, Splits, draw, hold_out, is_held_out, split_calibration
from secateur.data.unlabelled import read_unlabelled
from secateur.data.unreadable import Unreadable, read_batch
from secateur.data.yolo import read_yolo
from secateur.runtime.errors import DataError, UnknownName, UsageError
from secateur.runtime.local_path import check_local

__all__ = [
    "Batch",
    "DataSet",
    "FileImages",
    "Images",
    "LabelKind",
    "NormalisedImages",
    "TensorImages",
    "Unreadable",
    "batches",
    "draw_calibration_images",
    "is_held_out",
    "load",
    "read_batch",
    "split_calibration",
]


@dataclass(frozen=True)
class DataSet:
    """Labelled images in three splits that share no image."""

    name: str
    class_names: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    has_labels: bool = True
    """Whether the labels are true ones, not those that the network predicts."""
    notes: tuple[str, ...] = ()
    """What to know of how the images were read, a sentence or two each."""
    kind: LabelKind = "classes"
    kept: KeptClasses | None = None
    """The classes that the images and the network were cut to; None: all."""

    def of_classes(self, kept: KeptClasses) -> DataSet:
        """Return the images that show one of the kept classes; all of them without labels.

        Raises `DataError` if there is none to score filters on, or none to test with.
        """
        parts = [self.train, self.validation, self.test]
        if self.kind != "none":
            parts = [images_of_classes(images, kept, self.kind) for images in parts]
        train, validation, test = parts
        for images, use in ((train, "training"), (test, "test")):
            if not len(images.labels):
                raise DataError(f"no {use} image of {self.name} shows one of the kept classes")
        return replace(
            self,
            class_names=kept.names,
            train=train,
            validation=validation,
            test=test,
            kept=kept,
        )

    @property
    def all_labels(self) -> tuple[Tensor, ...]:
        """The labels of the training, validation and test images."""
        return self.train.labels, self.validation.labels, self.test.labels

    @functools.cached_property
    def stored_size(self) -> tuple[int, int] | None:
        """Height and width of the training images, if all that are looked at have the same."""
        return stored_size(self.train)


READERS: dict[str, Callable[[Path], Splits]] = {
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "cub": read_cub,
    "fashion-mnist": read_fashion_mnist,
    "folder": read_folder,
    "imagenet": read_imagenet,
    "imagenette": read_imagenette,
    "images": read_unlabelled,
    "coco": read_coco,
    "yolo": read_yolo,
    "arrays": read_arrays,
}
"""Readers by the kind of data set, for those in a folder: `KIND:DIR`."""

KINDS_IN_FILES = ("arrays", "coco", "yolo")
"""Kinds of data sets that may be named by a file."""
CONTENTS = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "fashion-mnist": "FashionMNIST",
    "cub": "train_test_split.txt",
}
"""A file or folder by which a kind of data set can be told."""
DIGITS = "digits"
HUGGING_FACE = "hf"
NONE = "none"
"""Name of the data set without images, for annotated concepts, which bring their own."""
SYNTHETIC = "synthetic"
"""Name of the data set without images in whose place a run synthesises some."""


def load(
    name: str,
    *,
    validation_fraction: float = 0.1,
    ignore_index: int | None = None,
    seed: int = 0,
) -> DataSet:
    """Return the named data set, with a stratified part of its training images held out.

    `name` is one of `config.DATA_FORMS`, or `none`, which has no images, as `synthetic` has none;
    docs/reference/data.md describes the folders. `digits` needs the extra `demo`, `hf` the extra
    `hf`. `ignore_index` is the value of masks' pixels that count for nothing. Which images are held
    out depends on `seed` alone. Raises `UnknownName`, `UsageError` or `DataError`.
    """
    kind, _, directory = name.partition(":")
    if name in (NONE, SYNTHETIC):
        nothing = FileImages((), torch.zeros(0, dtype=torch.int64))
        return DataSet(name, (), nothing, nothing, nothing)
    splits = _read(name, kind, directory, ignore_index)
    generator = torch.Generator().manual_seed(seed)
    train, validation = hold_out(splits.train, validation_fraction, generator)
    notes = splits.notes
    if splits.origin:
        counts = [len(images.labels) for images in (train, validation, splits.test)]
        uses = "{} images to score filters and train on, {} for choices, {} to test".format(*counts)
        notes = (f"{splits.origin}. Used: {uses}.", *notes)
    return DataSet(
        name,
        splits.class_names,
        train,
        validation,
        splits.test,
        splits.kind != "none",
        notes,
        splits.kind,
    )


def _read(name: str, kind: str, directory: str, ignore_index: int | None) -> Splits:
    """Return the splits of the data set `kind:directory`, which is called `name`."""
    if name == DIGITS:
        return read_digits()
    if kind == HUGGING_FACE:
        if not directory:
            raise UsageError(f"data set {name!r} needs a name or a folder: hf:NAME_OR_PATH")
        return read_hugging_face(directory, ignore_index)
    readers: dict[str, Callable[[Path], Splits]] = {
        **READERS,
        SEGMENTATION: partial(read_segmentation, ignored=ignore_index),
    }
    if kind not in readers:
        if Path(name).expanduser().exists():
            raise UsageError(f"data set {name!r} has no kind: {_advise_kind(Path(name))}")
        raise UnknownName("data set", kind, [*readers, HUGGING_FACE, DIGITS, SYNTHETIC])
    if not directory:
        raise UsageError(f"data set {name!r} needs a folder: {kind}:DIR")
    check_local(directory)
    path = Path(directory).expanduser()
    if path.is_file() and kind not in KINDS_IN_FILES:
        archive = ": unpack it, and name the folder that it makes" if is_archive(path) else ""
        raise DataError(f"{directory} is a file, not a folder to read {kind} from{archive}")
    if not path.exists():
        raise DataError(f"no folder {directory} to read {kind} from")
    return readers[kind](path)


def _advise_kind(path: Path) -> str:
    """Return what to write for a data set that was named by its folder alone."""
    if is_archive(path):
        return "unpack it, and write folder:DIR with the folder that it makes"
    if path.is_file():
        return "write folder:DIR with the folder that holds the images of each class in a folder"
    kinds = (kind for kind, file in CONTENTS.items() if (path / file).exists())
    return f"write {next(kinds, 'folder')}:{path}"


def draw_calibration_images(
    images: Images, count: int, *, stratified: bool = True, seed: int = 0
) -> Images:
    """Return `count` random images, or all of them if there are fewer.

    `stratified` draws equally from every class, as far as `count` divides; without it no labels are
    used. Which images are drawn depends on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    return draw(images, count, generator, stratified=stratified)
