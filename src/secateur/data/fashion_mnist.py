"""Fashion-MNIST (Xiao, Rasul & Vollgraf, 2017, arXiv 1708.07747)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from secateur.data.images import TensorImages
from secateur.data.splits import Splits, check_labelling
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import TEXT, read_unzipped

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SIDE = 28


def read_fashion_mnist(directory: Path) -> Splits:
    """Return Fashion-MNIST as grey RGB images, from torchvision's `FashionMNIST/raw` or its files.

    The four files may be as published, `.gz`, or unpacked, and may lie in `raw` or in `directory`
    itself. torchvision's own reader takes only unpacked files, and doesn't say which one is
    damaged. Raises `DataError`.
    """
    raw = next(
        (
            folder
            for folder in (directory / "FashionMNIST" / "raw", directory / "raw", directory)
            if _find(folder, "train-images-idx3-ubyte")
        ),
        None,
    )
    if raw is None:
        raise DataError(
            f"no Fashion-MNIST in {directory}: expected FashionMNIST/raw/train-images-idx3-ubyte "
            "or the same as .gz"
        )
    return Splits(CLASS_NAMES, _part(raw, "train"), _part(raw, "t10k"))


def _part(raw: Path, part: str) -> TensorImages:
    pixels = _read_idx(raw, f"{part}-images-idx3-ubyte", dimensions=3)
    labels = torch.from_numpy(_read_idx(raw, f"{part}-labels-idx1-ubyte", dimensions=1)).long()
    if pixels.shape[1:] != (SIDE, SIDE):
        height, width = pixels.shape[1:]
        raise DataError(f"{raw}: images of {part} are {width}×{height}, not {SIDE}×{SIDE}")
    check_labelling(labels, len(pixels), len(CLASS_NAMES), f"{raw}, {part}")
    grey = torch.from_numpy(pixels)[:, None].expand(-1, 3, -1, -1)
    return TensorImages(grey.contiguous(), labels)


def _find(raw: Path, name: str) -> Path | None:
    files = (file for file in (raw / name, raw / f"{name}.gz") if file.is_file())
    return next(files, None)


def _read_idx(raw: Path, name: str, *, dimensions: int) -> np.ndarray:
    """Return the array of bytes in an IDX file, the format of MNIST.

    It holds two zeros, the type (8: unsigned bytes), the number of dimensions, each size as four
    bytes with the highest first, then the values.
    """
    file = _find(raw, name)
    if file is None:
        raise DataError(f"no {name} or {name}.gz of Fashion-MNIST in {raw}")
    content = read_unzipped(file, TEXT, DataError)
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{file} is not an IDX file of bytes in {dimensions} dimensions")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{file} holds {len(content) - start} values, not the {math.prod(shape)} of its header"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
