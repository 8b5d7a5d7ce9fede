"""Any folder of images with one folder for each class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from secateur.data.images import FileImages
from secateur.data.splits import Splits, hold_out
from secateur.runtime.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
TEST_FRACTION = 0.2
PARTS = frozenset(
    {
        *("train", "training", "test", "testing", "val", "valid", "validation"),
        *("dev", "eval", "evaluation"),
    }
)
"""Usual names of splits; a class of such a name is taken for a mistake in the layout."""
ARCHIVERS = "__MACOSX"
"""A folder that the archiver of macOS leaves."""


def read_folder(directory: Path) -> Splits:
    """Return the images of class folders, in the splits that the folder has.

    With `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`) those are the splits. With `CLASS/`
    alone a fixed fifth of each class is for testing. Classes are numbered in the order of their
    names. A `test` without classes, such as one whose labels are withheld, is skipped if `val`
    has some. Raises `DataError` if there are no images, or the splits have different classes or
    other names.
    """
    if not (directory / "train").is_dir():
        classes = class_folders(directory)
        _check_no_parts(directory, classes)
        generator = torch.Generator().manual_seed(0)
        train, test = hold_out(_numbered(directory, classes), TEST_FRACTION, generator)
        return Splits(classes, train, test)
    classes = class_folders(directory / "train")
    scored = [part for part in ("test", "val") if (directory / part).is_dir()]
    if not scored:
        raise DataError(f"{directory} has a train folder but neither test nor val")
    part = next((part for part in scored if _folders(directory / part)), scored[0])
    check_same_classes(directory, part, class_folders(directory / part), classes)
    train = _numbered(directory / "train", classes)
    return Splits(classes, train, _numbered(directory / part, classes))


def class_folders(directory: Path) -> tuple[str, ...]:
    """Return the names of a folder's subfolders, sorted; raises `DataError` without any."""
    names = _folders(directory)
    if not names:
        raise DataError(f"no class folders in {directory}")
    return names


def _folders(directory: Path) -> tuple[str, ...]:
    """Return the names of a folder's subfolders, sorted, without hidden ones and archivers'."""
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    return tuple(sorted(name for name in names if not _is_hidden(Path(name))))


def _is_hidden(path: Path) -> bool:
    """Return whether any part of the path is hidden or left by an archiver."""
    return any(part.startswith(".") or part == ARCHIVERS for part in path.parts)


def _check_no_parts(directory: Path, classes: Iterable[str]) -> None:
    """Raise `DataError` if class folders are named like splits."""
    parts = [name for name in classes if name.lower() in PARTS]
    if parts:
        raise DataError(
            f"{directory} has no folder train, and {', '.join(parts)} would be read as classes: "
            "call the parts train/CLASS/ and test/CLASS/ or val/CLASS/, or rename these classes"
        )


def check_same_classes(
    directory: Path, part: str, classes: Iterable[str], expected: Iterable[str]
) -> None:
    """Raise `DataError` if a split has other classes than `train`."""
    odd = sorted(set(classes) ^ set(expected))
    if odd:
        raise DataError(f"{directory}: train and {part} have different classes: {brief(odd)}")


def brief(names: list[str]) -> str:
    """Return the first five names as text."""
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def images_of(directory: Path, labels: Mapping[str, int]) -> FileImages:
    """Return the images of the folders named in `labels`, each with the label of its folder.

    Folders come in the order of `labels`, with their subfolders, but without hidden files. Raises
    `DataError` if a folder has no images.
    """
    paths: list[Path] = []
    path_labels: list[int] = []
    for name, label in labels.items():
        inside = directory / name
        files = sorted(
            path
            for path in inside.rglob("*")
            if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(inside))
        )
        if not files:
            raise DataError(f"no images in {inside} ({', '.join(sorted(SUFFIXES))})")
        paths += files
        path_labels += [label] * len(files)
    return FileImages(tuple(paths), torch.tensor(path_labels))


def _numbered(directory: Path, classes: tuple[str, ...]) -> FileImages:
    return images_of(directory, {name: index for index, name in enumerate(classes)})
