"""Broden: the broadly and densely labelled images of Network Dissection.

The layout is the one that Network Dissection publishes (Bau, Zhou, Khosla, Oliva & Torralba, CVPR
2017; `joinseg.py` of github.com/CSAILVision/NetDissect writes it): `index.csv` lists the images
and their labels by category, `label.csv` names the labels; `images/` holds both the images and the
label images, whose red + 256 · green is a label's number.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.data.annotated import NO_CLASS, AnnotatedFiles, look_up, read_pixels
from secateur.data.concept_masks import UNLABELLED, Concept
from secateur.data.masks import UNKNOWN
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import inside

NOT_CATEGORIES = ("image", "split", "ih", "iw", "sh", "sw")
"""Columns of `index.csv` beside the labels."""
LARGEST = 65_535
"""The largest label, since red + 256 · green encodes it, and the largest side of an image."""
DIGITS = 9
"""The most digits of a number in the tables."""


def read_broden(directory: Path) -> AnnotatedFiles:
    """Return all images of `index.csv` that have a label, of both splits.

    A label of a whole image (scenes, textures) covers all of it. A label's category is the one that
    most of its images have it in. `category.csv` and `c_*.csv`, which number the labels anew for
    each category, are not needed. Raises `DataError`.
    """
    labels = _rows(directory / "label.csv", ("number", "name", "category"))
    table = np.full(max(_number(row["number"]) for row in labels) + 1, UNKNOWN, dtype=np.int64)
    table[0] = UNLABELLED
    concepts = []
    for place, row in enumerate(labels):
        table[_number(row["number"])] = place
        # As in "material(36);object(3)", the largest first.
        concepts.append(Concept(row["name"], re.split(r"[(;]", row["category"])[0]))
    index = directory / "index.csv"
    rows = _rows(index, NOT_CATEGORIES)
    categories = [name for name in rows[0] if name not in NOT_CATEGORIES]
    images = directory / "images"
    paths, annotations = [], []
    for row in rows:
        labels_here = [label for name in categories for label in row[name].split(";") if label]
        whole = [_number(label) for label in labels_here if label.isdecimal()]
        files = [inside(images, file, DataError) for file in labels_here if not file.isdecimal()]
        if not labels_here:
            continue
        paths.append(inside(images, row["image"], DataError))
        size = (_number(row["sh"]), _number(row["sw"]))
        annotations.append(BrodenLabels(tuple(files), tuple(whole), size, table, index))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(paths)} Broden images are missing: {missing[0]}")
    if not paths:
        raise DataError(f"no image in {index} has a label")
    return AnnotatedFiles(
        tuple(paths), torch.full((len(paths),), NO_CLASS), tuple(concepts), tuple(annotations)
    )


@dataclass(frozen=True, eq=False)
class BrodenLabels:
    """The labels of one image: label images, and labels of the whole image."""

    files: tuple[Path, ...]
    whole: tuple[int, ...]
    size: tuple[int, int]
    """Height and width of the label images, which may be smaller than the image."""
    table: np.ndarray
    """Index of the concept by label; see `look_up`."""
    index: Path
    """The file that the labels are from, for errors."""

    def planes(self, height: int, width: int) -> Tensor:
        """Return each pixel's concept index: that of the label image at the pixel's centre."""
        rows, columns = (
            ((np.arange(side) + 0.5) * labelled / side).astype(np.int64)
            for side, labelled in zip((height, width), self.size, strict=True)
        )
        layers = [
            look_up(self._labels(file), self.table, file)[rows[:, None], columns]
            for file in self.files
        ]
        whole = look_up(np.array(self.whole, dtype=np.int64), self.table, self.index)
        layers += [number.expand(height, width) for number in whole]
        return torch.stack(layers)

    def _labels(self, file: Path) -> np.ndarray:
        pixels = read_pixels(file)
        if pixels.ndim != 3:
            raise DataError(f"the mask {file} is not in colours: expected red + 256 · green")
        if pixels.shape[:2] != self.size:
            actual, expected = (f"{size[1]}×{size[0]}" for size in (pixels.shape, self.size))
            raise DataError(f"the mask {file} is {actual}; index.csv says {expected}")
        red, green = (pixels[..., channel].astype(np.int64) for channel in (0, 1))
        labels: np.ndarray = red + 256 * green
        return labels


def _rows(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} can't be read: {error}") from error
    if any(None in row for row in rows):
        raise DataError(f"{file} has a line with more fields than there are columns")
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise DataError(f"{file} has no column {missing[0]!r} or no rows")
    return rows


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > DIGITS or int(text) > LARGEST:
        raise DataError(
            f"Broden's tables must hold numbers of at most {LARGEST}; they hold {text[:20]!r}"
        )
    return int(text)
