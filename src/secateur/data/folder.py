"""Any folder of images sorted into one folder a class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from secateur.data.images import FileImages
from secateur.data.splits import Splits, hold_out
from secateur.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
TEST_FRACTION = 0.2
PARTS = frozenset(
    {
        *("train", "training", "test", "testing", "val", "valid", "validation"),
        *("dev", "eval", "evaluation"),
    }
)
"""What folders of parts are called; a class of such a name is taken for a layout gone wrong."""
ARCHIVERS = "__MACOSX"
"""A folder that is left by the archiver of macOS."""


def read_folder(directory: Path) -> Splits:
    """Class folders, split as the folder says.

    With `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`) those are the parts. With `CLASS/`
    alone a fifth of each class, always the same one, is the test part. Classes are numbered in
    the order of their names. A `test` without classes, as of images whose labels are withheld, is
    passed over where `val` has some. Raises `DataError` where there are no images, the parts differ
    or are called otherwise.
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
    """The names of the folders in a folder, sorted; raises `DataError` where there are none."""
    names = _folders(directory)
    if not names:
        raise DataError(f"no class folders in {directory}")
    return names


def _folders(directory: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, without hidden ones and archivers' leavings."""
    names = (entry.name for entry in directory.iterdir() if entry.is_dir())
    return tuple(sorted(name for name in names if not _is_hidden(Path(name))))


def _is_hidden(path: Path) -> bool:
    """Whether the path goes through anything hidden, or left by an archiver."""
    return any(part.startswith(".") or part == ARCHIVERS for part in path.parts)


def _check_no_parts(directory: Path, classes: Iterable[str]) -> None:
    """Raises `DataError` where what would be classes are parts, which then would count as one."""
    parts = [name for name in classes if name.lower() in PARTS]
    if parts:
        raise DataError(
            f"{directory} has no folder train, and {', '.join(parts)} would be read as classes: "
            "parts must be called train/CLASS/ and test/CLASS/ or val/CLASS/, classes otherwise"
        )


def check_same_classes(
    directory: Path, part: str, found: Iterable[str], expected: Iterable[str]
) -> None:
    """Raises `DataError` where a part has other classes than `train`."""
    odd = sorted(set(found) ^ set(expected))
    if odd:
        raise DataError(f"{directory}: train and {part} have different classes: {brief(odd)}")


def brief(names: list[str]) -> str:
    """The first few names."""
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def images_of(directory: Path, labels: Mapping[str, int]) -> FileImages:
    """The images in folders of these names, each with the label of its folder.

    Folders are taken in the order of `labels`, with the folders inside them, but without what is
    hidden. Raises `DataError` where one has no images.
    """
    paths: list[Path] = []
    numbers: list[int] = []
    for name, label in labels.items():
        inside = directory / name
        found = sorted(
            path
            for path in inside.rglob("*")
            if path.suffix.lower() in SUFFIXES and not _is_hidden(path.relative_to(inside))
        )
        if not found:
            raise DataError(f"no images in {inside} ({', '.join(sorted(SUFFIXES))})")
        paths += found
        numbers += [label] * len(found)
    return FileImages(tuple(paths), torch.tensor(numbers))


def _numbered(directory: Path, classes: tuple[str, ...]) -> FileImages:
    return images_of(directory, {name: number for number, name in enumerate(classes)})
