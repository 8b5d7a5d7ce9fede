"""A folder of images without labels, at any depth."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.data.folder_layout import Role, folders, role_of
from secateur.data.image_files import describe_passed_over, list_images
from secateur.data.images import FileImages, Images
from secateur.data.in_memory import TEST_EVERY, every_nth
from secateur.data.splits import Splits
from secateur.runtime.errors import DataError

KIND = "images"
FEWEST = 10
"""Images that are needed."""


def read_unlabelled(directory: Path) -> Splits:
    """Return the images of a folder and its subfolders, with zeros for labels.

    With folders `train` and `test` (or `val`; `folder_layout` has their other names) those are the
    parts; otherwise every `TEST_EVERY`-th image, in the order of the paths, is the test part.
    Raises `DataError` if there are too few.
    """
    parts = _parts(directory)
    train = list_images(parts.get("train", directory))
    tested: Role | None = next((role for role in ("test", "val") if role in parts), None)
    if "train" in parts and tested is not None:
        test: Images = _images(list_images(parts[tested]).images)
        images: Images = _images(train.images)
        origin = "" if tested == "test" else f"{parts[tested]} is the test part"
    else:
        both = _images(train.images)
        is_test = every_nth(TEST_EVERY, len(both.labels))
        images, test = (both.take(part.nonzero()[:, 0]) for part in (~is_test, is_test))
        origin = f"{directory} has no test part: every {TEST_EVERY}th image is held out for it"
    if len(images.labels) + len(test.labels) < FEWEST or not len(test.labels):
        count = len(images.labels) + len(test.labels)
        raise DataError(f"{directory} has {count} images, too few: give at least {FEWEST}")
    notes = tuple(filter(None, [describe_passed_over(train.passed_over)]))
    return Splits((), images, test, notes, origin, "none")


def _parts(directory: Path) -> dict[Role, Path]:
    parts: dict[Role, Path] = {}
    for folder in folders(directory):
        role = role_of(folder.name)
        if role is not None:
            parts.setdefault(role, folder)
    return parts


def _images(paths: tuple[Path, ...]) -> FileImages:
    return FileImages(paths, torch.zeros(len(paths), dtype=torch.int64))
