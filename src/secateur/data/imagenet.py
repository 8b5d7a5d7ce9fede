"""ImageNet's 1,000 classes of ILSVRC-2012 (Russakovsky et al., IJCV 2015), or some of them.

A class is a folder named by its WordNet id; its label is the place of that id among all 1,000 in
order, as in every published network. `imagenet_classes.txt` lists the ids as timm 1.0 does
(`timm/data/_info/imagenet_synsets.txt`) and the names as torchvision 0.29 does
(`torchvision/models/_meta.py`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from secateur.data.folder import brief, check_same_classes, class_folders, images_of
from secateur.data.splits import Splits
from secateur.runtime.errors import DataError

TEST = "val"
"""ILSVRC's validation images are for final scores: the labels of its test images aren't public."""


def read_imagenet(directory: Path) -> Splits:
    """Return all of ILSVRC-2012 from `train/WNID/` and `val/WNID/`, torchvision's layout.

    Raises `DataError` if a class is missing from either split, is empty, or is unknown.
    """
    names = class_names()
    for part in ("train", TEST):
        missing = sorted(names.keys() - set(_known_folders(directory, part)))
        if missing:
            raise DataError(
                f"{directory / part} lacks {len(missing)} of ImageNet's 1,000 classes: "
                f"{brief(missing)}; to use some of the classes, pass imagenette:DIR"
            )
    return _splits(directory, list(names))


def read_imagenette(directory: Path) -> Splits:
    """Return some classes of ImageNet, such as Imagenette's ten (fast.ai, 2019), in that layout.

    Labels and names are those of all 1,000 classes, so that a network trained on ImageNet can be
    scored as it is. Raises `DataError` if a folder is not a class of ImageNet, a class is empty,
    or the splits have different classes.
    """
    folders = _known_folders(directory, "train")
    check_same_classes(directory, TEST, _known_folders(directory, TEST), folders)
    return _splits(directory, folders)


def class_names() -> dict[str, str]:
    """Return a name for each WordNet id, in the order of the labels."""
    text = resources.files("secateur.data").joinpath("imagenet_classes.txt").read_text("utf-8")
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in text.splitlines())}


def _splits(directory: Path, folders: list[str]) -> Splits:
    names = class_names()
    label_of = {wnid: label for label, wnid in enumerate(names)}
    labels = {wnid: label_of[wnid] for wnid in folders}
    train, test = (images_of(directory / part, labels) for part in ("train", TEST))
    return Splits(tuple(names.values()), train, test)


def _known_folders(directory: Path, part: str) -> list[str]:
    """Return the WordNet ids in a split, in order; raises `DataError` for any other folder."""
    if not (directory / part).is_dir():
        raise DataError(f"no folder {part} in {directory}: expected train/WNID/ and {TEST}/WNID/")
    if any((directory / part).glob("ILSVRC2012_val_*")):
        raise DataError(
            f"the images of {directory / part} are not sorted into class folders: "
            "torchvision.datasets.ImageNet sorts them from the published archives"
        )
    folders = class_folders(directory / part)
    unknown = sorted(set(folders) - class_names().keys())
    if unknown:
        raise DataError(
            f"{directory / part} has folders that are not among the WordNet ids of ImageNet's "
            f"1,000 classes: {brief(unknown)}"
        )
    return list(folders)
