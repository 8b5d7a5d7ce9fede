"""Annotated objects in YOLO's text files, in the layout of Ultralytics (docs.ultralytics.com)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from secateur.data.folder_layout import Role
from secateur.data.image_files import is_image, list_images
from secateur.data.images import FileImages, Images
from secateur.data.images_with_objects import UNIT, ImagesWithObjects
from secateur.data.objects import Objects, Segment
from secateur.data.splits import Splits, hold_out_fifth
from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import SMALL_TEXT, TEXT, read_bounded

KIND = "yolo"
TABLES = ("data.yaml", "dataset.yaml", "classes.yaml", "data.yml", "dataset.yml")
"""The file that describes the data set; another `.yaml` is taken if it is the only one."""
OUTSIDE = 1.01
"""Largest coordinate, as a fraction of the side: rounding may leave the image."""


@dataclass(frozen=True)
class _Table:
    """What the YAML file says."""

    file: Path
    parts: dict[Role, tuple[str, ...]]
    names: tuple[str, ...]
    keypoints: tuple[int, int] | None
    """How many, and how many numbers each."""
    roots: tuple[Path, ...]
    """Folders that the parts may lie in."""


def read_yolo(place: Path) -> Splits:
    """Return images with objects from a folder with a `data.yaml`, or from that file.

    The file has `names`, and for `train`, `val` and `test` a folder of images, a list of files in a
    `.txt`, or several of these. The objects of `images/…/a.jpg` are in `labels/…/a.txt`; without
    that file there are none. A line is `class x y width height` in fractions of the sides, with
    keypoints if the file has `kpt_shape`, or `class x1 y1 x2 y2 x3 y3 …`, a polygon. A part without
    any label file is not annotated. `test` is the test part if it is annotated, else `val`, else a
    fifth of the images. Raises `DataError` that names file and line.
    """
    table = _read_table(place if place.is_file() else _find_table(place))
    parts = {role: _read_part(table, role) for role in table.parts}
    if "train" not in parts:
        raise DataError(f"{table.file} names no images to train on: add train: images/train")
    roles: tuple[Role, ...] = ("test", "val")
    tested: Role | None = next(
        (role for role in roles if isinstance(parts.get(role), ImagesWithObjects)), None
    )
    train, notes, origin = parts["train"], [], ""
    if not isinstance(train, ImagesWithObjects):
        notes.append(
            "The images of train have no labels: fine-tuning follows the original's outputs, and "
            "`secateur train` needs labels."
        )
    if tested is None:
        train, test = hold_out_fifth(train)
        origin = f"{table.file} has no annotated val: a fifth of train is held out to test"
    else:
        test = parts[tested]
        if tested == "val":
            origin = f"val is the test part of {table.file.parent}"
    return Splits(table.names, train, test, tuple(notes), origin, "objects")


def _find_table(directory: Path) -> Path:
    files = [directory / name for name in TABLES if (directory / name).is_file()]
    if not files:
        files = sorted([*directory.glob("*.yaml"), *directory.glob("*.yml")])
        if len(files) != 1:
            what = "several .yaml files" if files else "no data.yaml"
            raise DataError(f"{directory} has {what}: name the one that describes the data set")
    return files[0]


def _read_table(file: Path) -> _Table:
    text = read_bounded(file, SMALL_TEXT, DataError)
    try:
        table = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not YAML: {reason}") from error
    if not isinstance(table, dict):
        raise DataError(f"{file} describes no data set: it needs names, train and val")
    root = Path(str(table.get("path") or "."))
    roles: tuple[Role, ...] = ("train", "val", "test")
    return _Table(
        file,
        {role: _texts(table[role]) for role in roles if table.get(role)},
        _names(table, file),
        _keypoints(table, file),
        (file.parent / root, file.parent),
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _names(table: dict[str, Any], file: Path) -> tuple[str, ...]:
    names = table.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise DataError(f"{file}: the keys of names must be the numbers from 0 on")
        names = [names[number] for number in range(len(names))]
    if names is None and isinstance(table.get("nc"), int):
        names = [f"class {number}" for number in range(table["nc"])]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} names no classes: add names: [cat, dog]")
    return tuple(map(str, names))


def _keypoints(table: dict[str, Any], file: Path) -> tuple[int, int] | None:
    shape = table.get("kpt_shape")
    if shape is None:
        return None
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) for size in shape)
        or shape[0] < 1
        or shape[1] not in (2, 3)
    ):
        raise DataError(f"{file}: kpt_shape must be [keypoints, 2 or 3], not {shape}")
    return shape[0], shape[1]


def _read_part(table: _Table, role: Role) -> Images:
    """Return the images of a part, with objects if it is annotated."""
    paths = [path for text in table.parts[role] for path in _image_paths(table, text)]
    if not paths:
        raise DataError(f"{table.file}: {role} has no images")
    images = FileImages(tuple(paths), torch.zeros(len(paths), dtype=torch.int64))
    files = [label_file(path) for path in paths]
    folders = {file.parent: file.parent.is_dir() for file in files}
    if not any(folders.values()) or not any(file.is_file() for file in files):
        return images
    return ImagesWithObjects(images, tuple(_read_objects(file, table) for file in files))


def _image_paths(table: _Table, text: str) -> list[Path]:
    """Return the images of a folder, or those that a text file lists."""
    # Roboflow writes `../train/images` for `train/images`.
    texts = (text, text.removeprefix("../"))
    places = [root / name for root in table.roots for name in texts]
    place = next((path for path in places if path.exists()), None)
    if place is None:
        raise DataError(f"{table.file} names {text}, but there is no {places[0]}")
    if place.is_dir():
        return list(list_images(place).images)
    lines = read_bounded(place, TEXT, DataError).decode("utf-8", "replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    paths = [place.parent / name for name in names]
    for path in paths:
        if not is_image(path):
            raise DataError(f"{place} lists {path.name}, which is no image")
    return paths


def label_file(image: Path) -> Path:
    """Return the file of an image's objects: the last folder `images` of its path is `labels`."""
    parts = list(image.parts)
    places = [place for place, name in enumerate(parts[:-1]) if name == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read_objects(file: Path, table: _Table) -> Objects:
    """Return the objects in a file, in fractions of the image's sides; none if there is no file."""
    lines: Iterable[str] = ()
    if file.is_file():
        text = read_bounded(file, TEXT, DataError).decode("utf-8", "replace")
        lines = text.splitlines()
    rows = {  # equal lines count once, as in Ultralytics
        line: _read_line(line, number, file, table)
        for number, line in enumerate(lines, 1)
        if line.strip()
    }.values()
    points = None
    if table.keypoints is not None:
        points = torch.tensor([row.keypoints for row in rows]).reshape(-1, table.keypoints[0], 3)
    boxes = torch.tensor([row.box for row in rows]).reshape(-1, 4)
    return Objects(
        boxes=boxes,
        classes=torch.tensor([row.number for row in rows], dtype=torch.int64),
        is_crowd=torch.zeros(len(rows), dtype=torch.bool),
        areas=torch.tensor([row.area for row in rows], dtype=torch.float32),
        size=UNIT,
        keypoints=points,
        segments=tuple(row.segment for row in rows)
        if not rows or any(row.segment is not None for row in rows)
        else None,
    )


@dataclass(frozen=True)
class _Line:
    """One object, in fractions of the image's sides."""

    number: int
    box: tuple[float, float, float, float]
    area: float
    segment: Segment | None = None
    keypoints: tuple[float, ...] = ()


def _read_line(line: str, number: int, file: Path, table: _Table) -> _Line:
    place = f"{file}, line {number}"
    try:
        values = [float(word) for word in line.split()]
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error
    label, coordinates = values[0], values[1:]
    if label not in range(len(table.names)):
        raise DataError(f"{place}: there is no class {line.split()[0]} of {len(table.names)}")
    if table.keypoints is not None:
        return _pose(place, int(label), coordinates, table.keypoints)
    _check(place, coordinates)
    if len(coordinates) == 4:
        box = _corners(coordinates)
        return _Line(int(label), box, _area(box))
    if len(coordinates) < 6 or len(coordinates) % 2:
        raise DataError(
            f"{place} has {len(values)} numbers: expected class x y width height, or a class and "
            "three or more points"
        )
    xs, ys = coordinates[::2], coordinates[1::2]
    box = (min(xs), min(ys), max(xs), max(ys))
    return _Line(int(label), box, _polygon_area(xs, ys), [coordinates])


def _pose(place: str, label: int, values: list[float], shape: tuple[int, int]) -> _Line:
    count, numbers = shape
    if len(values) != 4 + count * numbers:
        raise DataError(
            f"{place} has {1 + len(values)} numbers, and kpt_shape asks for {5 + count * numbers}"
        )
    keypoints: list[float] = []
    for start in range(4, len(values), numbers):
        x, y = values[start : start + 2]
        keypoints += [x, y, values[start + 2] if numbers == 3 else 2.0 * (x > 0 or y > 0)]
    _check(place, [*values[:4], *(v for n, v in enumerate(keypoints) if n % 3 < 2)])
    box = _corners(values[:4])
    return _Line(label, box, _area(box), keypoints=tuple(keypoints))


def _check(place: str, coordinates: list[float]) -> None:
    for value in coordinates:
        if not math.isfinite(value) or not 0 <= value <= OUTSIDE:
            raise DataError(f"{place} holds {value:g}: coordinates are fractions from 0 to 1")


def _corners(values: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = values
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return left, top, right, bottom


def _area(box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def _polygon_area(xs: list[float], ys: list[float]) -> float:
    pairs = zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for x, y, next_x, next_y in pairs)) / 2
