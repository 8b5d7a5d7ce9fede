"""How a folder of images and masks is laid out: which mask belongs to which image, by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.data.folder_layout import Role, folders, role_of
from secateur.data.image_files import is_hidden, is_image, list_images
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import TEXT, inside, read_bounded

IMAGE_FOLDERS = ("images", "image", "img", "imgs", "JPEGImages", "inputs")
"""What the folder of the images is called beside one of masks."""
MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annot", "annots"),
    *("gt", "groundtruth", "ground_truth", "segmentation", "segmentations", "targets"),
    *("SegmentationClass", "SegmentationClassAug", "seg"),
)
"""What the folder of the masks is called."""
ENDINGS = ("_masks", "_mask", "_labels", "_label", "_annotations", "_annot", "_gt", "_seg", "annot")
"""What follows a part's name in the name of the folder of its masks: `train_masks`,
`trainannot`."""

CITYSCAPES = ("leftImg8bit", "gtFine")
CITYSCAPES_IMAGE = "_leftImg8bit.png"
TRAIN_IDS, LABEL_IDS = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"
"""Masks of the 19 classes that are scored, or of all 34. The former are read if they are there."""
VOC = ("JPEGImages", "SegmentationClass")
VOC_LISTS = Path("ImageSets", "Segmentation")


@dataclass(frozen=True)
class Pairs:
    """Images with their masks, in the same order."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class MaskLayout:
    """The parts of a data set of images and masks."""

    kind: str
    """`cityscapes` (with the masks `TRAIN_IDS`), `cityscapes-34` (with `LABEL_IDS`), `voc`,
    `camvid` (SegNet's copy) or `folders`."""
    root: Path
    parts: dict[Role, Pairs]
    """A data set without parts has `train` alone."""
    passed_over: tuple[Path, ...] = ()
    """Images without a mask."""


def read_mask_layout(directory: Path) -> MaskLayout:
    """Return the layout of a folder.

    Cityscapes, PASCAL VOC, and folders of images with a folder of masks each, in parts or not; see
    docs/reference/data.md. Raises `DataError` if there are no masks, or none for some part.
    """
    if not directory.is_dir():
        raise DataError(f"no masks in {directory}: there is no such folder")
    for root in (directory, *_below(directory)):
        if all((root / name).is_dir() for name in CITYSCAPES):
            return _cityscapes(root)
        if all((root / name).is_dir() for name in VOC) and (root / VOC_LISTS).is_dir():
            return _voc(root)
    return _folders(directory)


def _below(directory: Path) -> Iterator[Path]:
    """Yield the folders one and two levels below, as `VOCdevkit/VOC2012`."""
    inner = folders(directory)
    yield from inner
    if directory.name == "VOCdevkit" or any(path.name == "VOCdevkit" for path in inner):
        for path in inner:
            yield from folders(path)


def _cityscapes(root: Path) -> MaskLayout:
    images, gt = (root / name for name in CITYSCAPES)
    ending = TRAIN_IDS if next(gt.rglob(f"*{TRAIN_IDS}"), None) is not None else LABEL_IDS
    parts: dict[Role, Pairs] = {}
    for folder in folders(images):
        role = role_of(folder.name)
        if role not in ("train", "val"):  # the masks of `test` are withheld
            continue
        files = [
            path for path in list_images(folder).images if path.name.endswith(CITYSCAPES_IMAGE)
        ]
        masks = []
        for path in files:
            name = path.name.removesuffix(CITYSCAPES_IMAGE) + ending
            masks.append(gt / path.parent.relative_to(images) / name)
            if not masks[-1].is_file():
                raise DataError(f"the image {path} has no mask {masks[-1]}")
        parts[role] = Pairs(tuple(files), tuple(masks))
    kind = "cityscapes" if ending == TRAIN_IDS else "cityscapes-34"
    return MaskLayout(kind, root, _checked(root, parts))


def _voc(root: Path) -> MaskLayout:
    parts: dict[Role, Pairs] = {}
    for role in ("train", "val", "test"):
        table = root / VOC_LISTS / f"{role}.txt"
        if not table.is_file():
            continue
        names = read_bounded(table, TEXT, DataError).decode("utf-8", "replace").split()
        images = [inside(root / VOC[0], f"{name}.jpg", DataError) for name in names]
        masks = [inside(root / VOC[1], f"{name}.png", DataError) for name in names]
        missing = [path for path in (*images, *masks) if not path.is_file()]
        if missing and role == "test":  # its masks are withheld
            continue
        if missing:
            raise DataError(f"{table} lists {missing[0].stem}, but there is no {missing[0]}")
        parts[role] = Pairs(tuple(images), tuple(masks))
    return MaskLayout("voc", root, _checked(root, parts))


def _folders(directory: Path) -> MaskLayout:
    parts: dict[Role, Pairs] = {}
    passed_over: list[Path] = []
    is_camvid = False
    for role, images, masks in _folder_pairs(directory):
        if role in parts:
            continue
        pairs, without = _paired(images, masks)
        is_camvid |= masks.name == f"{images.name}annot"
        if pairs.images:
            parts[role] = pairs
        passed_over += without
    kind = "camvid" if is_camvid else "folders"
    return MaskLayout(kind, directory, _checked(directory, parts), tuple(passed_over))


def _folder_pairs(directory: Path) -> list[tuple[Role, Path, Path]]:
    """Return the folders of images with that of their masks, by part; the usual names first.

    `PART_masks` beside `PART`; `images/PART` with `masks/PART`; `PART/images` with `PART/masks`;
    or `images` with `masks`. Raises `DataError` if there are none.
    """
    pairs = [*_parts_with_masks_beside(directory), *_parts_in(directory), *_parts_around(directory)]
    alone = _images_and_masks(directory)
    if not pairs and alone is not None:
        pairs = [("train", *alone)]
    beside = _masks_of(directory) if directory.name else None
    if not pairs and beside is not None:
        pairs = [("train", directory, beside)]
    if not pairs:
        raise DataError(
            f"no masks in {directory}: expected images/ and masks/, train/ and train_masks/, or "
            "the layout of CamVid, PASCAL VOC or Cityscapes"
        )
    return sorted(pairs, key=lambda pair: len(pair[1].name))


def _parts_with_masks_beside(directory: Path) -> Iterator[tuple[Role, Path, Path]]:
    for folder in folders(directory):
        role, masks = role_of(folder.name), _masks_of(folder)
        if role is not None and masks is not None:
            yield role, folder, masks


def _masks_of(folder: Path) -> Path | None:
    """Return the folder of masks beside a folder of images, if there is one."""
    paths = (folder.with_name(f"{folder.name}{ending}") for ending in ENDINGS)
    return next((path for path in paths if path.is_dir()), None)


def _parts_in(directory: Path) -> Iterator[tuple[Role, Path, Path]]:
    pair = _images_and_masks(directory)
    if pair is None:
        return
    images, masks = pair
    roles = {role_of(path.name): path for path in folders(masks)}
    for folder in folders(images):
        role = role_of(folder.name)
        if role is not None and role in roles:
            yield role, folder, roles[role]


def _parts_around(directory: Path) -> Iterator[tuple[Role, Path, Path]]:
    for folder in folders(directory):
        role, pair = role_of(folder.name), _images_and_masks(folder)
        if role is not None and pair is not None:
            yield (role, *pair)


def _images_and_masks(directory: Path) -> tuple[Path, Path] | None:
    inside_it = {path.name.lower(): path for path in folders(directory)}
    images = _first(inside_it, IMAGE_FOLDERS)
    masks = _first(inside_it, MASK_FOLDERS)
    return None if images is None or masks is None else (images, masks)


def _first(paths: dict[str, Path], names: Iterable[str]) -> Path | None:
    return next((paths[name.lower()] for name in names if name.lower() in paths), None)


def _paired(images: Path, masks: Path) -> tuple[Pairs, list[Path]]:
    """Return the images that have a mask with it, and those that have none.

    A mask has the name of its image, or that name and an ending such as `_mask`.
    """
    by_stem: dict[Path, Path] = {}
    for path in sorted(masks.rglob("*"), reverse=True):
        if path.is_file() and is_image(path) and not is_hidden(path.name):
            by_stem[path.relative_to(masks).with_suffix("")] = path
    shortened = {_without_ending(stem): path for stem, path in by_stem.items()}
    pairs, without = [], []
    for image in list_images(images).images:
        stem = image.relative_to(images).with_suffix("")
        mask = by_stem.get(stem, shortened.get(_without_ending(stem)))
        if mask is None:
            without.append(image)
        else:
            pairs.append((image, mask))
    return Pairs(tuple(image for image, _ in pairs), tuple(mask for _, mask in pairs)), without


MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_L", "_P")


def _without_ending(stem: Path) -> Path:
    name = stem.name.replace("-", "_")
    for ending in (*MASK_ENDINGS, "_image", "_img", "_sat"):
        if name.lower().endswith(ending.lower()):
            return stem.with_name(name[: -len(ending)])
    return stem.with_name(name)


def _checked(root: Path, parts: dict[Role, Pairs]) -> dict[Role, Pairs]:
    if not any(pairs.images for pairs in parts.values()):
        raise DataError(f"no image in {root} has a mask of its name")
    if "train" not in parts:
        raise DataError(f"{root} has no part train with masks, only {', '.join(parts)}")
    return parts
