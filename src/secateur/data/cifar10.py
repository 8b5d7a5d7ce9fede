"""CIFAR-10 (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from secateur.data.images import TensorImages
from secateur.data.splits import Splits
from secateur.errors import DataError

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32


def read_cifar10(directory: Path) -> Splits:
    """CIFAR-10 from either of two layouts.

    Stacked: `train_labels.npy`, `test_labels.npy` and, in `train*/` and `test/`, lossless WebP
    files, each a column of 32×32 images, in the order of the labels. torchvision's: the folder
    `cifar-10-batches-py`, checked against its published digests before it is read. Raises
    `DataError` where neither is there or one is incomplete.
    """
    if (directory / "train_labels.npy").is_file():
        return Splits(CLASS_NAMES, _stacked(directory, "train"), _stacked(directory, "test"))
    root = directory.parent if directory.name == "cifar-10-batches-py" else directory
    if (root / "cifar-10-batches-py").is_dir():
        return Splits(CLASS_NAMES, _torchvision(root, train=True), _torchvision(root, train=False))
    raise DataError(
        f"no CIFAR-10 in {directory}: expected train_labels.npy with WebP columns, "
        "or torchvision's cifar-10-batches-py"
    )


def _stacked(directory: Path, part: str) -> TensorImages:
    files = sorted(directory.glob(f"{part}*/*.webp"))
    if not files:
        raise DataError(f"no {part}*/*.webp files in {directory}")
    columns = []
    for file in files:
        try:
            with Image.open(file) as image:
                column = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
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
    return _checked(pixels, torch.from_numpy(labels.astype(np.int64)), directory)


def _torchvision(root: Path, *, train: bool) -> TensorImages:
    try:
        stored = torchvision.datasets.CIFAR10(str(root), train=train, download=False)
    except RuntimeError as error:
        raise DataError(f"CIFAR-10 in {root} is incomplete or damaged: {error}") from error
    pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return _checked(pixels, torch.tensor(stored.targets), root)


def _checked(pixels: Tensor, labels: Tensor, directory: Path) -> TensorImages:
    if labels.shape != (len(pixels),):
        raise DataError(f"{directory}: {len(pixels)} images but {len(labels)} labels")
    if int(labels.max()) >= len(CLASS_NAMES) or int(labels.min()) < 0:
        raise DataError(f"{directory}: a label lies outside 0 to {len(CLASS_NAMES) - 1}")
    return TensorImages(pixels, labels)
