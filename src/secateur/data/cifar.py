"""CIFAR-10 and CIFAR-100 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

torchvision's folders hold pickles: their published digests are checked before they are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from secateur.data.images import TensorImages
from secateur.data.splits import Splits, check_labelling
from secateur.data.unreadable import DECODING_ERRORS, opened_image
from secateur.runtime.errors import DataError

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
"""The classes of CIFAR-10; those of CIFAR-100 come with its files."""
SIDE = 32


def read_cifar10(directory: Path) -> Splits:
    """Return CIFAR-10 from either of two layouts.

    Stacked: `train_labels.npy`, `test_labels.npy` and, in `train*/` and `test/`, lossless WebP
    files, each a column of 32×32 images, in the order of the labels. torchvision's: the folder
    `cifar-10-batches-py`. Raises `DataError` if there is neither, or one is incomplete.
    """
    if (directory / "train_labels.npy").is_file():
        return Splits(CLASS_NAMES, _stacked(directory, "train"), _stacked(directory, "test"))
    root = _root(directory, "cifar-10-batches-py")
    if root is None:
        raise DataError(
            f"no CIFAR-10 in {directory}: expected train_labels.npy with WebP columns, "
            "or torchvision's cifar-10-batches-py"
        )
    _, train = _torchvision(torchvision.datasets.CIFAR10, 10, root, train=True)
    _, test = _torchvision(torchvision.datasets.CIFAR10, 10, root, train=False)
    return Splits(CLASS_NAMES, train, test)


def read_cifar100(directory: Path) -> Splits:
    """Return CIFAR-100 with its hundred fine labels, from torchvision's `cifar-100-python`.

    Raises `DataError` if it is missing, incomplete or damaged.
    """
    root = _root(directory, "cifar-100-python")
    if root is None:
        raise DataError(
            f"no CIFAR-100 in {directory}: expected torchvision's folder cifar-100-python"
        )
    class_names, train = _torchvision(torchvision.datasets.CIFAR100, 100, root, train=True)
    if len(class_names) != 100:
        raise DataError(f"{root} has {len(class_names)} class names, not 100")
    _, test = _torchvision(torchvision.datasets.CIFAR100, 100, root, train=False)
    return Splits(class_names, train, test)


def _root(directory: Path, name: str) -> Path | None:
    """Return the folder that holds the named one; `directory` may be either of them."""
    root = directory.parent if directory.name == name else directory
    return root if (root / name).is_dir() else None


def _stacked(directory: Path, part: str) -> TensorImages:
    files = sorted(directory.glob(f"{part}*/*.webp"))
    if not files:
        raise DataError(f"no {part}*/*.webp files in {directory}")
    columns = []
    for file in files:
        try:
            with opened_image(file) as image:
                column = np.asarray(image.convert("RGB"))
        except DECODING_ERRORS as error:
            raise DataError(f"the image {file} can't be read: {error}") from error
        if column.shape[1] != SIDE or column.shape[0] % SIDE:
            raise DataError(f"{file} is {column.shape[1]}×{column.shape[0]}, not a column of 32×32")
        columns.append(column.reshape(-1, SIDE, SIDE, 3))
    pixels = torch.from_numpy(np.concatenate(columns)).permute(0, 3, 1, 2).contiguous()
    file = directory / f"{part}_labels.npy"
    try:
        labels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} can't be read: {error}") from error
    class_indices = torch.from_numpy(labels.astype(np.int64))
    check_labelling(class_indices, len(pixels), len(CLASS_NAMES), directory)
    return TensorImages(pixels, class_indices)


def _torchvision(
    dataset_class: Any, classes: int, root: Path, *, train: bool
) -> tuple[tuple[str, ...], TensorImages]:
    """Return the class names and one split, read by torchvision's dataset class."""
    try:
        stored = dataset_class(str(root), train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(f"CIFAR-{classes} in {root} is incomplete or damaged: {error}") from error
    pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(stored.targets)
    check_labelling(labels, len(pixels), classes, root)
    return tuple(stored.classes), TensorImages(pixels, labels)
