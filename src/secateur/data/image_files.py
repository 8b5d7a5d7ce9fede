"""Which files of a folder are images, and how many others were passed over."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from secateur.runtime.errors import DataError

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
    "PCX": (".pcx",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "QOI": (".qoi",),
    "DDS": (".dds",),
    "ICO": (".ico",),
}
"""Suffixes of images by Pillow's name of the format; documents, films and tables are left out.

Of an animation the first frame is the image.
"""
HEIF = frozenset({".heic", ".heif", ".hif"})
"""Suffixes of the photos of telephones, which Pillow reads with the package pillow-heif."""
SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin"})
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""What archivers and file managers leave, in lower case; neither read nor counted."""


@dataclass(frozen=True)
class Listing:
    """The files below a folder."""

    images: tuple[Path, ...]
    """In the order of their paths."""
    passed_over: Counter[str]
    """How many other files there are, by suffix in lower case."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the images that can be read here, in lower case."""
    Image.init()
    suffixes = {suffix for name in FORMATS if name in Image.OPEN for suffix in FORMATS[name]}
    return frozenset(suffixes | HEIF) if _has_heif() else frozenset(suffixes)


def _has_heif() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def register_heif() -> None:
    """Let Pillow read HEIF, if the package for it is installed."""
    if _has_heif():
        importlib.import_module("pillow_heif").register_heif_opener()


def is_image(path: Path) -> bool:
    """Return whether a file's suffix is that of an image that can be read here."""
    return path.suffix.lower() in image_suffixes()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or left by an archiver or a file manager."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def list_images(directory: Path) -> Listing:
    """Return the images in a folder and its subfolders, but not what is hidden.

    Links to files and to folders are followed, to each folder once. Raises `DataError` if there are
    no images, or a folder can't be read.
    """
    listing = _list_files(directory)
    if listing.images:
        return listing
    if not listing.passed_over:
        raise DataError(f"no images in {directory}: add some, or delete the class")
    raise DataError(
        f"no images in {directory}: it holds files that can't be read as images "
        f"({count_suffixes(listing.passed_over)}): convert them to PNG or JPEG"
    )


def count_images(directory: Path) -> int:
    """Return how many images `list_images` would return; 0 if there are none."""
    return len(_list_files(directory).images)


def _list_files(directory: Path) -> Listing:
    images: list[Path] = []
    passed_over: Counter[str] = Counter()
    visited: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(directory, followlinks=True, onerror=_refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = Path(root, name)
            if is_hidden(name):
                continue
            if is_image(path):
                images.append(path)
            else:
                passed_over[path.suffix.lower()] += 1
    return Listing(tuple(sorted(images)), passed_over)


def _refuse(error: OSError) -> None:
    raise DataError(f"the folder {error.filename} can't be read: {error.strerror}") from error


def count_suffixes(suffixes: Mapping[str, int]) -> str:
    """Return files by their suffixes as text, the most frequent first: `8 .txt, 4 .heic`."""
    ordered = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {suffix or 'without suffix'}" for suffix, count in ordered[:5]]
    if len(ordered) > 5:
        parts.append(f"{sum(count for _, count in ordered[5:])} others")
    return ", ".join(parts)


def describe_passed_over(suffixes: Mapping[str, int]) -> str:
    """Return the notice on files that were passed over, or nothing if there are none."""
    total = sum(suffixes.values())
    if not total:
        return ""
    remedy = "; pip install pillow-heif reads photos in HEIF" if HEIF & suffixes.keys() else ""
    files = "1 file was" if total == 1 else f"{total} files were"
    return f"{files} passed over: {count_suffixes(suffixes)}{remedy}."
