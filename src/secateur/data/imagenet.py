"""ImageNet's 1,000 classes of ILSVRC-2012 (Russakovsky et al., IJCV 2015), or some of them.

A class is a folder named by its WordNet id; its label is the place of that id among all 1,000 in
order, as in every published network. `imagenet_classes.txt` lists the ids as timm 1.0 does
(`timm/data/_info/imagenet_synsets.txt`) and the names as torchvision 0.29 does
(`torchvision/models/_meta.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch

from secateur.data.folder import images_of
from secateur.data.folder_layout import (
    brief,
    check_same_classes,
    class_folders,
    data_folders,
)
from secateur.data.image_files import describe_passed_over
from secateur.data.images import FileImages
from secateur.data.splits import Splits
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import TEXT, read_bounded

TEST = "val"
"""ILSVRC's validation images are for final scores: the labels of its test images aren't public."""
SOLUTION = "LOC_val_solution.csv"
"""Kaggle's table of the classes of `val`."""


def read_imagenet(directory: Path) -> Splits:
    """Return all of ILSVRC-2012 from `train/WNID/` and `val/WNID/`, torchvision's layout.

    Kaggle's layout is read, too: see `_read_solution`. Raises `DataError` if a class is missing
    from either split, is empty, or is unknown.
    """
    return _read(directory, "imagenet")


def read_imagenette(directory: Path) -> Splits:
    """Return some classes of ImageNet, such as Imagenette's ten (fast.ai, 2019), in that layout.

    Labels and names are those of all 1,000 classes, so that a network trained on ImageNet can be
    scored as it is. Raises `DataError` if a folder is not a class of ImageNet, a class is empty,
    or the splits have different classes.
    """
    return _read(directory, "imagenette")


def class_names() -> dict[str, str]:
    """Return a name for each WordNet id, in the order of the labels."""
    text = resources.files("secateur.data").joinpath("imagenet_classes.txt").read_text("utf-8")
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in text.splitlines())}


def readable_class_names(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """Return the names of a network's classes as people read them.

    WordNet ids, the names of ImageNet's folders, become words. Without names a network of as many
    classes as ImageNet has its classes.
    """
    words = class_names()
    if not names:
        return tuple(words.values()) if classes == len(words) else ()
    return tuple(words.get(name, name) for name in names)


def _read(directory: Path, kind: str) -> Splits:
    """Return the splits of `imagenet` with all of the classes, or of `imagenette` with some."""
    names = class_names()
    root = _image_root(directory)
    folders = _known_folders(root, "train", kind)
    solution = _read_solution(root, kind)
    tested = sorted(set(solution.values())) if solution else _known_folders(root, TEST, kind)
    check_same_classes(directory, TEST, tested, folders)
    label_of = {wnid: label for label, wnid in enumerate(names)}
    labels = {wnid: label_of[wnid] for wnid in folders}
    train, passed_over = images_of(root / "train", labels)
    if solution:
        test = _unsorted(root / TEST, solution, labels)
    else:
        test, others = images_of(root / TEST, labels)
        passed_over += others
    notes = filter(None, [describe_passed_over(passed_over)])
    return Splits(tuple(names.values()), train, test, tuple(notes))


def _image_root(directory: Path) -> Path:
    """Return the folder around `train` and `val`: this one, or the one in Kaggle's archive."""
    inner = (directory, directory / "Data" / "CLS-LOC", directory / "ILSVRC" / "Data" / "CLS-LOC")
    return next((path for path in inner if (path / "train").is_dir()), directory)


def _read_solution(root: Path, kind: str) -> dict[str, str]:
    """Return the WordNet id of each image of `val` by its name, in Kaggle's layout, else nothing.

    There `val` holds the images themselves, and `LOC_val_solution.csv`, at most three folders
    above, their ids. Raises `DataError` if it is missing, incomplete or damaged.
    """
    files = sorted((root / TEST).glob("ILSVRC2012_val_*"))
    if not files:
        return {}
    tables = (folder / SOLUTION for folder in (root, *root.resolve().parents[:3]))
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        raise DataError(
            f"the images of {root / TEST} are not sorted into class folders: "
            "torchvision.datasets.ImageNet sorts them from the published archives"
        )
    lines = read_bounded(table, TEXT, DataError).decode("utf-8", "replace").splitlines()[1:]
    ids = {name: rest.split(" ")[0] for name, _, rest in (line.partition(",") for line in lines)}
    unknown = [path.name for path in files if ids.get(path.stem) not in class_names()]
    if unknown:
        raise DataError(
            f"{table} has no class of ImageNet for {len(unknown)} of {len(files)} images, "
            f"{unknown[0]} among them"
        )
    if kind == "imagenet":
        _check_all(root / TEST, sorted(ids.values()))
    return {path.name: ids[path.stem] for path in files}


def _unsorted(part: Path, solution: dict[str, str], labels: dict[str, int]) -> FileImages:
    """Return the images of a part without class folders, in the order that sorted ones have."""
    names = sorted(solution, key=lambda name: (labels[solution[name]], name))
    return FileImages(
        tuple(part / name for name in names),
        torch.tensor([labels[solution[name]] for name in names]),
    )


def _check_all(part: Path, folders: list[str]) -> None:
    missing = sorted(class_names().keys() - set(folders))
    if missing:
        raise DataError(
            f"{part} lacks {len(missing)} of ImageNet's 1,000 classes: {brief(missing)}; to use "
            "some of the classes, pass imagenette:DIR"
        )


def _known_folders(root: Path, part: str, kind: str) -> list[str]:
    """Return the WordNet ids in a split, in order; raises `DataError` for any other folder."""
    if not (root / part).is_dir():
        inside = data_folders(root)
        advice = f"; name {kind}:{inside[0]}" if inside else ""
        raise DataError(
            f"no folder {part} in {root}: expected train/WNID/ and {TEST}/WNID/{advice}"
        )
    folders = class_folders(root / part, kind)
    unknown = sorted(set(folders) - class_names().keys())
    if unknown:
        raise DataError(
            f"{root / part} has folders that are not among the WordNet ids of ImageNet's 1,000 "
            f"classes: {brief(unknown)}"
        )
    if kind == "imagenet":
        _check_all(root / part, list(folders))
    return list(folders)
