"""Annotated objects in COCO's JSON (Lin et al., Microsoft COCO, ECCV 2014; cocodataset.org)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.data.folder_layout import Role, folders, role_of
from secateur.data.images import FileImages, Images
from secateur.data.images_with_objects import ImagesWithObjects
from secateur.data.objects import Objects, Segment
from secateur.data.splits import Splits, hold_out_fifth
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import GIB, inside, read_bounded

KIND = "coco"
KINDS_OF_FILES = ("instances", "person_keypoints")
"""What annotation files are called before the name of their part; the first is preferred."""
BESIDE = "_annotations.coco.json"
"""The annotations in a part's folder of images, as Roboflow exports them."""


@dataclass(frozen=True)
class _Part:
    """The annotations of a part and the folders that its images may be in."""

    file: Path
    name: str
    image_folders: tuple[Path, ...]


def read_coco(place: Path) -> Splits:
    """Return images with objects from a folder in COCO's layout, or from one annotation file.

    `place` holds `annotations/instances_PART.json` and the images in `PART/` or `images/PART/`; or
    `PART/_annotations.coco.json` with the images beside. If it is an annotation file its own kind
    of annotation is read (`person_keypoints_val2017.json`), for the other parts, too. `test` is the
    test part if it is annotated, else `val`, else a fifth of the images. Classes are numbered in
    the order of the categories' ids. Raises `DataError`.
    """
    parts = _find_parts(place)
    if "train" not in parts and len(parts) == 1:
        parts = {"train": next(iter(parts.values()))}
    if "train" not in parts:
        paths = ", ".join(str(part.file) for part in parts.values())
        raise DataError(f"{place} has no annotations of a part train, only {paths}")
    tested: Role | None = next((role for role in ("test", "val") if role in parts), None)
    train_table = _read_table(parts["train"].file)
    categories = _categories(train_table, parts["train"].file)
    train: Images = _read_part(parts["train"], train_table, categories)
    test: Images
    if tested is None:
        origin = f"{place} has one part: a fifth of its images is held out to test"
        train, test = hold_out_fifth(train)
    else:
        origin = "" if tested == "test" else f"{parts[tested].name} is the test part of {place}"
        table = _read_table(parts[tested].file)
        other = _categories(table, parts[tested].file)
        if other != categories:
            raise DataError(
                f"{parts['train'].file} and {parts[tested].file} have different categories"
            )
        test = _read_part(parts[tested], table, categories)
    names = tuple(name for _, name in categories)
    return Splits(names, train, test, origin=origin, kind="objects")


def _find_parts(place: Path) -> dict[Role, _Part]:
    """Return the annotated parts; raises `DataError` if there are none."""
    if place.is_file():
        kind, part = _kind_and_part(place.stem)
        root = place.parent.parent if place.parent.name == "annotations" else place.parent
        parts = _parts_in(root, place.parent, kind)
        if role_of(part) is None:
            return {"train": _Part(place, part, (place.parent, root / "images", root))}
        return parts
    for folder in (place / "annotations", place):
        for kind in KINDS_OF_FILES:
            if parts := _parts_in(place, folder, kind):
                return parts
    for folder in folders(place):
        role, file = role_of(folder.name), folder / BESIDE
        if role is not None and file.is_file() and role not in parts:
            parts[role] = _Part(file, folder.name, (folder,))
    if parts:
        return parts
    files = sorted(place.glob("*.json")) or sorted(place.glob("annotations/*.json"))
    if len(files) == 1:
        return {"train": _Part(files[0], files[0].stem, (place / "images", place))}
    advice = f"; name one of its files, as {KIND}:{files[0]}" if files else ""
    raise DataError(
        f"no annotations in {place}: expected annotations/instances_PART.json, or "
        f"PART/{BESIDE}{advice}"
    )


def _kind_and_part(stem: str) -> tuple[str, str]:
    kind, _, part = stem.rpartition("_")
    return kind, part


def _parts_in(root: Path, folder: Path, kind: str) -> dict[Role, _Part]:
    parts: dict[Role, _Part] = {}
    for file in sorted(folder.glob(f"{kind}_*.json" if kind else "*.json")):
        file_kind, name = _kind_and_part(file.stem)
        role = role_of(name)
        if file_kind == kind and role is not None and role not in parts:
            parts[role] = _Part(file, name, (root / name, root / "images" / name, root / "images"))
    return parts


def _read_table(file: Path) -> dict[str, Any]:
    text = read_bounded(file, GIB, DataError)
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(table, dict) or not all(
        isinstance(table.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise DataError(f"{file} needs the lists images, annotations and categories of COCO")
    return table


def _categories(table: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    """Return the ids and names of the classes, in the order of the ids."""
    categories = []
    for number, row in enumerate(table["categories"]):
        with _Row(file, "categories", number) as read:
            categories.append((read.whole(row["id"]), str(row["name"])))
    if not categories:
        raise DataError(f"{file} has no categories")
    # Roboflow puts a category above the others that no object has.
    used = {row.get("category_id") for row in table["annotations"] if isinstance(row, dict)}
    is_parent = {str(row.get("supercategory")) for row in table["categories"]}
    if categories[0][0] == 0 and 0 not in used and categories[0][1] in is_parent:
        categories = categories[1:]
    return sorted(categories)


class _Row:
    """Raises `DataError` that names a row of the JSON file for whatever is wrong with it."""

    def __init__(self, file: Path, table: str, number: int) -> None:
        self._place = f"{file}, {table}[{number}]"

    def __enter__(self) -> _Row:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError):
            raise DataError(f"{self._place} has no {error}") from error
        if isinstance(error, TypeError | ValueError | AttributeError | OverflowError):
            raise DataError(f"{self._place}: {error}") from error

    def whole(self, value: Any) -> int:
        """Return a whole number; raises `ValueError`."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{value!r} is not a whole number")
        return value

    def numbers(self, values: Any, count: int | None, what: str) -> list[float]:
        """Return finite numbers; raises `ValueError`."""
        if not isinstance(values, list) or count not in (None, len(values)):
            raise ValueError(f"{what} must be a list of {count} numbers, not {values!r}")
        numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{what} holds a number that is not finite")
        return numbers


def _read_part(
    part: _Part, table: dict[str, Any], categories: Sequence[tuple[int, str]]
) -> ImagesWithObjects:
    """Return the images of a part, in the order of the file, with their objects."""
    class_of = {number: place for place, (number, _) in enumerate(categories)}
    sizes: dict[int, tuple[int, int]] = {}
    names: dict[int, str] = {}
    for number, row in enumerate(table["images"]):
        with _Row(part.file, "images", number) as read:
            identity = read.whole(row["id"])
            sizes[identity] = (read.whole(row["height"]), read.whole(row["width"]))
            names[identity] = str(row["file_name"])
            if min(sizes[identity]) < 1:
                raise ValueError(f"its size is {sizes[identity]}")
    if not names:
        raise DataError(f"{part.file} lists no images")
    rows: dict[int, list[_Annotation]] = {identity: [] for identity in names}
    for number, row in enumerate(table["annotations"]):
        with _Row(part.file, "annotations", number) as read:
            image = read.whole(row["image_id"])
            if image not in rows:
                raise ValueError(f"there is no image {image}")
            rows[image].append(_annotation(read, row, class_of))
    folder = _image_folder(part, names.values())
    paths = tuple(inside(folder, name, DataError) for name in names.values())
    images = FileImages(paths, torch.zeros(len(paths), dtype=torch.int64))
    points = {len(row.keypoints) for objects in rows.values() for row in objects if row.keypoints}
    if len(points) > 1:
        raise DataError(f"{part.file} has objects with {sorted(points)} numbers of keypoints")
    count = next(iter(points), 0) // 3
    objects = tuple(_objects(rows[identity], sizes[identity], count) for identity in names)
    return ImagesWithObjects(images, objects)


def _image_folder(part: _Part, names: Iterable[str]) -> Path:
    """Return the first folder that holds the first image."""
    first = next(iter(names))
    for folder in part.image_folders:
        if inside(folder, first, DataError).is_file():
            return folder
    tried = ", ".join(str(folder) for folder in part.image_folders)
    raise DataError(f"{part.file} lists {first}, which is in none of {tried}")


@dataclass(frozen=True)
class _Annotation:
    """One object as the file has it."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom."""
    number: int
    is_crowd: bool
    area: float
    keypoints: list[float]
    segment: Segment | None


def _annotation(read: _Row, row: Mapping[str, Any], class_of: Mapping[int, int]) -> _Annotation:
    category = read.whole(row["category_id"])
    if category not in class_of:
        raise ValueError(f"there is no category {category}")
    left, top, width, height = read.numbers(row["bbox"], 4, "bbox")
    if width < 0 or height < 0:
        raise ValueError(f"bbox has the sides {width} and {height}")
    return _Annotation(
        (left, top, left + width, top + height),
        class_of[category],
        bool(row.get("iscrowd", 0)),
        float(row.get("area", width * height)),
        read.numbers(row.get("keypoints", []), None, "keypoints"),
        _segment(read, row.get("segmentation")),
    )


def _segment(read: _Row, segment: Any) -> Segment | None:
    if not segment:
        return None
    if isinstance(segment, dict):
        if not {"size", "counts"} <= segment.keys():
            raise ValueError("segmentation needs size and counts")
        return segment
    polygons = [read.numbers(polygon, None, "segmentation") for polygon in segment]
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon of segmentation needs three points or more")
    return polygons


def _objects(rows: Sequence[_Annotation], size: tuple[int, int], keypoints: int) -> Objects:
    has_segments = any(row.segment is not None for row in rows) or not rows
    points = None
    if keypoints:
        flat = [row.keypoints or 3 * keypoints * [0.0] for row in rows]
        points = torch.tensor(flat).reshape(-1, keypoints, 3)
    return Objects(
        boxes=torch.tensor([row.box for row in rows]).reshape(-1, 4),
        classes=torch.tensor([row.number for row in rows], dtype=torch.int64),
        is_crowd=torch.tensor([row.is_crowd for row in rows], dtype=torch.bool),
        areas=torch.tensor([row.area for row in rows], dtype=torch.float32),
        size=size,
        keypoints=points,
        segments=tuple(row.segment for row in rows) if has_segments else None,
    )
