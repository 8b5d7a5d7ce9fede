"""An exported file and what lies beside it: checked beforehand, and written as a whole or not."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from secateur.runtime.atomic_io import make_folder, move_file
from secateur.runtime.errors import ExportError, UsageError


def check_suffix(path: Path, suffix: str, name: str) -> None:
    """Raise `UsageError` unless a file to be written in the format `name` ends in `suffix`.

    A folder is an `ExportError`.
    """
    if path.is_dir() and path.suffix != PACKAGE:
        raise ExportError(f"{path} is a folder: name a file in it, {path / f'model{suffix}'}")
    if path.suffix != suffix:
        named = path.name.removesuffix(path.suffix) + suffix
        raise UsageError(
            f"{path}: a file of the format {name} has a name that ends in {suffix}: {named}"
        )


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise `ExportError` if `path` is a folder, or exists and `overwrite` is not set.

    A folder named like a package of files (`.mlpackage`) may be overwritten.
    """
    if path.is_dir() and path.suffix != PACKAGE:
        raise ExportError(f"{path} is a folder, not a file to write")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists already: choose another file or add --overwrite")


PACKAGE = ".mlpackage"
"""Suffix of Core ML's files, which are folders."""


@contextlib.contextmanager
def written_whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield where to write a file, and move all that the block writes beside it to `path`.

    The folder to write in lies beside `path`, on the same disk. Nothing is moved if the block
    raises an error, or if a file is there that must not be overwritten. Raises `ExportError` then,
    and `WriteError` if the disk is full, say.
    """
    check_free(path, overwrite=overwrite)
    make_folder(path.parent)
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise ExportError(f"can't write beside {path}: {error}") from error
    with folder as name:
        yield Path(name) / path.name
        parts = sorted(Path(name).iterdir())
        for part in parts:
            check_free(path.parent / part.name, overwrite=overwrite)
        for part in parts:
            place = path.parent / part.name
            if place.is_dir():
                shutil.rmtree(place)
            move_file(part, place)
