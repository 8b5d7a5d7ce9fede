"""How a folder of images is laid out: its classes, its training and test part, or what is wrong."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from secateur.data.image_files import count_suffixes, image_suffixes, is_hidden
from secateur.runtime.errors import DataError

Role = Literal["train", "test", "val"]
ROLES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation", "holdout"),
    "val": ("val", "valid", "validation", "dev"),
}
"""Usual names of the parts of a data set, those that are preferred first."""
FILLERS = frozenset({"set", "data", "dataset", "split", "images", "image", "img", "imgs", "seg"})
"""Words beside a part's name: `training_set`, `test images`, `seg_train`."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
TABLES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet", ".xml"})
"""Suffixes of files that may hold labels."""
LARGEST_SEARCH = 2000
"""Folders that are looked at for the one that was meant."""
DEEPEST_SEARCH = 4


@dataclass(frozen=True)
class Layout:
    """Where the images of a data set are: in class folders, with parts or without."""

    train: Path
    """Its folders are the classes."""
    test: Path | None
    """None if there is no test part with class folders."""
    unused: tuple[Path, ...] = ()
    """Other folders, beside the parts."""


def role_of(name: str) -> Role | None:
    """Return which part of a data set a folder's name says that it is, if any."""
    words = [word for word in re.split(r"[\W\d_]+", name.lower()) if word]
    bare = "".join(word for word in words if word not in FILLERS)
    for filler in ("set", "data", "images"):
        bare = bare.removesuffix(filler)
    return next((role for role, names in ROLES.items() if bare in names), None)


def read_layout(directory: Path) -> Layout:
    """Return the layout of a folder; raises `DataError` if parts have no training part."""
    inside = folders(directory)
    parts = sorted((path for path in inside if role_of(path.name) is not None), key=_rank)
    if not parts or _are_classes(inside):
        return Layout(directory, None)
    train, *scored = parts
    if role_of(train.name) != "train":
        names = ", ".join(path.name for path in inside if path in parts)
        raise DataError(
            f"{directory} has no folder train, and {names} would be read as classes: call the "
            "parts train/CLASS/ and test/CLASS/ or val/CLASS/, or rename these classes"
        )
    scored = [part for part in scored if role_of(part.name) != "train"]
    test = next((part for part in scored if folders(_inner(part))), None)
    unused = tuple(path for path in inside if path not in (train, test))
    return Layout(_inner(train), None if test is None else _inner(test), unused)


def _are_classes(inside: Iterable[Path]) -> bool:
    """Return whether folders are classes although one is called `train`, as a vehicle is."""
    flat = {path for path in inside if not folders(path) and _holds_images(path)}
    roles = {role_of(path.name) for path in flat}
    return {"train", None} <= roles and flat >= {
        path for path in inside if role_of(path.name) is not None
    }


def _rank(path: Path) -> tuple[int, int, str]:
    """Return what parts are sorted by: `train`, `test`, `val`; usual names before others."""
    role = role_of(path.name)
    assert role is not None
    names = ROLES[role]
    place = names.index(path.name) if path.name in names else len(names)
    return [*ROLES].index(role), place, path.name


def _inner(part: Path) -> Path:
    """Return the folder of a part's classes, such as the inner one of `seg_train/seg_train`."""
    while len(inner := folders(part)) == 1 and role_of(inner[0].name) == role_of(part.name):
        part = inner[0]
    return part


def folders(directory: Path) -> tuple[Path, ...]:
    """Return a folder's subfolders by name, without hidden ones; links to folders count."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    return tuple(directory / name for name in names if not is_hidden(name))


def class_folders(directory: Path, kind: str) -> tuple[str, ...]:
    """Return the names of a folder's subfolders, sorted; raises `DataError` without any.

    `kind` is how `--data` names the folder.
    """
    names = tuple(path.name for path in folders(directory))
    if not names:
        raise DataError(f"no class folders in {directory}: {_contents(directory, kind)}")
    return names


def check_classes(directory: Path, classes: Iterable[str], kind: str) -> None:
    """Raise `DataError` if a folder's subfolders are no classes: only one, or with parts inside."""
    names = tuple(classes)
    inner = {name: [path.name for path in folders(directory / name)] for name in names}
    if len(names) == 1:
        [name] = names
        advice = _advice(directory, kind)
        if advice:
            raise DataError(
                f"{directory} has only one class folder ({name!r}), and that holds "
                f"{_listed(inner[name])}: {advice}"
            )
        raise DataError(
            f"{directory} has only one class folder ({name!r}), but a classifier needs two: put "
            "the images of each class into a folder of their own"
        )
    for name, parts in inner.items():
        roles = [role_of(part) for part in parts]
        if "train" in roles and None not in roles and len(roles) > 1:
            part = parts[roles.index("train")]
            advice = _advice(directory, kind) or f"move its images to {part}/{name}/"
            raise DataError(
                f"{directory / name} would be read as a class, but it holds {_listed(parts)}: "
                f"{advice}"
            )


def check_same_classes(
    directory: Path, part: str, classes: Iterable[str], expected: Iterable[str]
) -> None:
    """Raise `DataError` if a part has other classes than `train`."""
    missing, extra = sorted({*expected} - {*classes}), sorted({*classes} - {*expected})
    sides = [
        f"only {name} has {brief(names)}"
        for name, names in (("train", missing), (part, extra))
        if names
    ]
    if sides:
        raise DataError(
            f"{directory}: train and {part} have different classes: {', and '.join(sides)}; "
            "both need the same class folders"
        )


def is_archive(path: Path) -> bool:
    """Return whether a file is an archive, by its suffix."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()


def brief(names: list[str]) -> str:
    """Return the first five names as text."""
    return f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _listed(names: list[str]) -> str:
    """Return the first five names of folders as text, joined by `and`."""
    if len(names) > 5:
        return f"{len(names)} folders ({brief(names)})"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _contents(directory: Path, kind: str) -> str:
    """Return what a folder without class folders holds, and what to do."""
    files = [path for path in directory.iterdir() if not is_hidden(path.name)]
    names = sorted(path.name for path in files)
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    archives = [path.name for path in files if is_archive(path)]
    if not files:
        return "it is empty"
    if images:
        tables = [name for name in names if Path(name).suffix.lower() in TABLES]
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        beside = f" and {brief(tables)}, which is not read" if tables else ""
        siblings = _readable_folders(directory.resolve().parent)
        is_class = role_of(directory.name) is None and sum(map(_holds_images, siblings)) > 1
        other = f"; if they are one class, name {kind}:{directory.parent}" if is_class else ""
        return (
            f"it holds {count}{beside}: sort them into a folder for each class, "
            f"{directory}/CLASS/{other}"
        )
    if archives:
        return f"it holds {brief(archives)}: unpack it, and name the folder that it makes"
    suffixes = count_suffixes(Counter(path.suffix.lower() for path in files))
    return (
        f"it holds other files ({suffixes}): put the images of each class into {directory}/CLASS/"
    )


def _advice(directory: Path, kind: str) -> str:
    """Return which folder inside to name, or nothing if none looks like a data set."""
    inside = data_folders(directory)
    return f"name {' or '.join(f'{kind}:{path}' for path in inside[:3])}" if inside else ""


def data_folders(directory: Path) -> list[Path]:
    """Return the uppermost folders inside that look like data sets: with parts or class folders."""
    waiting = deque((path, 1) for path in _readable_folders(directory))
    results: list[Path] = []
    for _ in range(LARGEST_SEARCH):
        if not waiting:
            break
        path, depth = waiting.popleft()
        inner = _readable_folders(path)
        if any(role_of(part.name) == "train" and _readable_folders(part) for part in inner) or (
            sum(role_of(part.name) is None and _holds_images(part) for part in inner) > 1
        ):
            results.append(path)
        elif depth < DEEPEST_SEARCH:
            waiting.extend((part, depth + 1) for part in inner)
    return results


def _readable_folders(directory: Path) -> tuple[Path, ...]:
    """Return `folders`, or none if the folder can't be read."""
    try:
        return folders(directory)
    except OSError:
        return ()


def _holds_images(directory: Path) -> bool:
    """Return whether images lie in a folder itself."""
    try:
        with os.scandir(directory) as entries:
            suffixes = (os.path.splitext(entry.name)[1].lower() for entry in entries)
            return any(suffix in image_suffixes() for suffix in suffixes)
    except OSError:
        return False
