"""ImageNet's 1,000 classes of ILSVRC-2012 (Russakovsky et al., IJCV 2015), or some of them.

A class is a folder that bears its WordNet id; its number is the place of that id among all 1,000
in order, as in every published network. `imagenet_classes.txt` has them: the ids as timm 1.0 lists
them (`timm/data/_info/imagenet_synsets.txt`), the names as torchvision 0.29 does
(`torchvision/models/_meta.py`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from secateur.data.folder import brief, check_same_classes, class_folders, images_of
from secateur.data.splits import Splits
from secateur.errors import DataError

TEST = "val"
"""ILSVRC's validation images, whose labels are public, are for scores; its test labels are not."""


def read_imagenet(directory: Path) -> Splits:
    """All of ILSVRC-2012: `train/WNID/` and `val/WNID/`, as torchvision's `ImageNet` lays them out.

    Raises `DataError` where a class is missing from either part, is empty, or is unknown.
    """
    names = class_names()
    for part in ("train", TEST):
        missing = sorted(names.keys() - set(_known_folders(directory, part)))
        if missing:
            raise DataError(
                f"{directory / part} lacks {len(missing)} of ImageNet's 1,000 classes: "
                f"{brief(missing)}; for a part of them there is imagenette:DIR"
            )
    return _splits(directory, list(names))


def read_imagenette(directory: Path) -> Splits:
    """Some classes of ImageNet, such as Imagenette's ten (fast.ai, 2019), in the same layout.

    Labels are the numbers among all 1,000 classes, and the names are those of all, so that a
    network made for ImageNet is scored as it is. Raises `DataError` where a folder is no class of
    ImageNet's, a class is empty, or the parts differ.
    """
    folders = _known_folders(directory, "train")
    check_same_classes(directory, TEST, _known_folders(directory, TEST), folders)
    return _splits(directory, folders)


def class_names() -> dict[str, str]:
    """A name for each WordNet id, in the order of the class numbers."""
    text = resources.files("secateur.data").joinpath("imagenet_classes.txt").read_text("utf-8")
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in text.splitlines())}


def _splits(directory: Path, folders: list[str]) -> Splits:
    names = class_names()
    numbers = {wnid: number for number, wnid in enumerate(names)}
    labels = {wnid: numbers[wnid] for wnid in folders}
    train, test = (images_of(directory / part, labels) for part in ("train", TEST))
    return Splits(tuple(names.values()), train, test)


def _known_folders(directory: Path, part: str) -> list[str]:
    """The WordNet ids in a part, in order; raises `DataError` where a folder is none of them."""
    if not (directory / part).is_dir():
        raise DataError(f"no folder {part} in {directory}: expected train/WNID/ and {TEST}/WNID/")
    if any((directory / part).glob("ILSVRC2012_val_*")):
        raise DataError(
            f"the images of {directory / part} are not sorted into class folders: "
            "torchvision.datasets.ImageNet does that from the published archives"
        )
    folders = class_folders(directory / part)
    unknown = sorted(set(folders) - class_names().keys())
    if unknown:
        raise DataError(
            f"{directory / part} has folders that are no WordNet id of ImageNet's "
            f"1,000 classes: {brief(unknown)}"
        )
    return list(folders)
