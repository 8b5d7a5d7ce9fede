"""The file beside masks that names their values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from secateur.runtime.errors import DataError
from secateur.runtime.input_limits import SMALL_TEXT, read_bounded

NAME_FILES = ("classes.json", "labels.json", "classes.txt", "labels.txt", "codes.txt")


def find_names(folders: Iterable[Path]) -> list[str] | None:
    """Return the names of the values from 0 on, or None without a file of names in any folder.

    JSON files hold a list, or an object with the list as `classes` or `labels`; the others a name
    on each line. Raises `DataError`.
    """
    for file in (folder / name for folder in folders for name in NAME_FILES):
        if file.is_file():
            return read_names(file)
    return None


def read_names(file: Path) -> list[str]:
    """Return the names in a file; raises `DataError` if it holds none."""
    try:
        text = read_bounded(file, SMALL_TEXT, DataError).decode("utf-8")
        content = json.loads(text) if file.suffix == ".json" else text.split("\n")
    except (ValueError, RecursionError) as error:
        raise DataError(f"the names in {file} can't be read: {error}") from error
    if isinstance(content, dict):
        content = content.get("classes", content.get("labels"))
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise DataError(f"{file} holds no list of names: expected it as 'classes' or 'labels'")
    names = [name.strip() for name in content]
    while names and not names[-1]:
        names.pop()
    return names
