"""Any folder of images sorted into one folder a class."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.data.images import FileImages
from secateur.data.splits import Splits, hold_out
from secateur.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
TEST_FRACTION = 0.2


def read_folder(directory: Path) -> Splits:
    """Class folders, split as the folder says.

    With `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`) those are the parts. With `CLASS/`
    alone a fifth of each class, always the same one, is the test part. Classes are numbered in
    the order of their names. Raises `DataError` where there are no images or the parts differ.
    """
    if not (directory / "train").is_dir():
        classes = _class_names(directory)
        generator = torch.Generator().manual_seed(0)
        train, test = hold_out(_part(directory, classes), TEST_FRACTION, generator)
        return Splits(classes, train, test)
    classes = _class_names(directory / "train")
    scored = [part for part in ("test", "val") if (directory / part).is_dir()]
    if not scored:
        raise DataError(f"{directory} has a train folder but neither test nor val")
    found = _class_names(directory / scored[0])
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise DataError(
            f"{directory}: train and {scored[0]} have different classes: {', '.join(odd[:5])}"
        )
    train = _part(directory / "train", classes)
    return Splits(classes, train, _part(directory / scored[0], classes))


def _class_names(directory: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in directory.iterdir() if entry.is_dir()))
    if not names:
        raise DataError(f"no class folders in {directory}")
    return names


def _part(directory: Path, classes: tuple[str, ...]) -> FileImages:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(f for f in (directory / name).rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"no images in {directory / name} ({', '.join(sorted(SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    return FileImages(tuple(paths), torch.tensor(labels))
