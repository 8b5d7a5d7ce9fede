"""Any folder of images with one folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from secateur.data.folder_layout import (
    Layout,
    check_classes,
    check_same_classes,
    class_folders,
    folders,
    read_layout,
    role_of,
)
from secateur.data.image_files import (
    count_images,
    describe_passed_over,
    is_hidden,
    is_image,
    list_images,
)
from secateur.data.images import FileImages, Images
from secateur.data.splits import Splits, hold_out_fifth

KIND = "folder"
"""How `--data` names these."""


def read_folder(directory: Path) -> Splits:
    """Return the images of class folders, in the parts that the folder has.

    With `train/CLASS/` and `test/CLASS/` (or `val/CLASS/`) those are the parts; `folder_layout`
    has their other names. With `CLASS/` or `train/CLASS/` alone a fixed fifth of each class is for
    testing. Classes are numbered in the order of their names. A `test` without class folders, such
    as one whose labels are withheld, is passed over. The notes say which folders and files were
    not read. Raises `DataError` if there are no images or only one class, or the parts have
    different classes.
    """
    layout = read_layout(directory)
    classes = class_folders(layout.train, KIND)
    check_classes(layout.train, classes, KIND)
    labels = {name: index for index, name in enumerate(classes)}
    train, passed_over = images_of(layout.train, labels)
    notes = [_describe_unused(layout)]
    parts: tuple[Images, Images]
    if layout.test is None:
        origin = f"{layout.train} has no test part: a fifth of each class is held out for it"
        origin += _describe_siblings(directory)
        parts = hold_out_fifth(train)
    else:
        check_same_classes(directory, layout.test.name, class_folders(layout.test, KIND), classes)
        origin = "" if layout.test.name == "test" else f"{layout.test} is the test part"
        test, others = images_of(layout.test, labels)
        parts = train, test
        passed_over += others
        notes.append(_describe_loose(layout.test))
    notes += [_describe_loose(layout.train), describe_passed_over(passed_over)]
    return Splits(classes, *parts, tuple(filter(None, notes)), origin)


def images_of(directory: Path, labels: Mapping[str, int]) -> tuple[FileImages, Counter[str]]:
    """Return the images of the folders named in `labels`, each with the label of its folder.

    Folders come in the order of `labels`, with their subfolders; see `list_images`. The count is
    that of the files that were passed over, by suffix. Raises `DataError` if a folder has no
    images.
    """
    paths: list[Path] = []
    path_labels: list[int] = []
    passed_over: Counter[str] = Counter()
    for name, label in labels.items():
        listing = list_images(directory / name)
        paths += listing.images
        path_labels += [label] * len(listing.images)
        passed_over += listing.passed_over
    return FileImages(tuple(paths), torch.tensor(path_labels)), passed_over


def _describe_siblings(directory: Path) -> str:
    """Return what to name for the test part beside a training part that was named itself."""
    parent = directory.resolve().parent
    parts = [path for path in folders(parent) if role_of(path.name) in ("test", "val")]
    if role_of(directory.resolve().name) != "train" or not parts:
        return ""
    return f" ({KIND}:{directory.parent} reads {parts[0].name}/ beside it)"


def _describe_unused(layout: Layout) -> str:
    """Return the notice on folders beside the parts, as far as they hold images."""
    counts = {path: count_images(path) for path in layout.unused}
    names = [f"{path}/ ({count} images)" for path, count in counts.items() if count]
    return f"Not used: {', '.join(names)}." if names else ""


def _describe_loose(directory: Path) -> str:
    """Return the notice on images beside class folders, whose class is unknown."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    count = sum(is_image(Path(name)) and not is_hidden(name) for name in names)
    if not count:
        return ""
    images = "1 image was" if count == 1 else f"{count} images were"
    return f"{images} passed over beside the class folders of {directory}: their class is unknown."
