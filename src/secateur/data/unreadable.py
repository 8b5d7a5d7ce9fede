"""Image files that can't be read: an error names them, or they are skipped on request."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from secateur.data.image_files import HEIF, register_heif
from secateur.runtime.errors import UnreadableImage
from secateur.runtime.input_limits import check_pixels

T = TypeVar("T")

DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error),
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # if warnings are errors
)
"""What Pillow raises for damaged files, depending on the format and the damage."""


class Unreadable:
    """The files that were left out, each once however often it was read."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Note files; threads that read ahead may call this at once."""
        self._names.update(names)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return tuple(sorted(self._names))


def read_batch(
    read: Callable[[Int[Tensor, "image"]], T],
    indices: Int[Tensor, "image"],
    unreadable: Unreadable | None = None,
) -> tuple[Int[Tensor, "readable"], T] | None:
    """Return the indices of the images that can be read, in order, and what `read` returns.

    `read` is called with all of `indices`. If it raises `UnreadableImage`, so does this function,
    unless there is an `Unreadable`: then the files are noted there, and `read` is called with the
    remaining indices. Returns None if none remain.
    """
    while len(indices):
        try:
            return indices, read(indices)
        except UnreadableImage as error:
            if unreadable is None:
                raise
            unreadable.add(error.files.values())
            indices = indices[~torch.isin(indices, torch.tensor(list(error.files)))]
    return None


@contextlib.contextmanager
def opened_image(source: Path | io.BytesIO) -> Iterator[Image.Image]:
    """Open an image without decoding it; raises one of `DECODING_ERRORS`, for huge images too."""
    if isinstance(source, Path) and source.suffix.lower() in HEIF:
        register_heif()
    try:
        image = Image.open(source)
    except (UnidentifiedImageError, ModuleNotFoundError) as error:
        # ultralytics puts a function in place of Pillow's that looks for a decoder of HEIC files.
        if isinstance(source, Path) and _starts_as_tiff(source):
            raise ValueError(
                "it is a TIFF whose bands or depth Pillow can't read: convert it to 8-bit RGB or "
                "grey, or pass tensors to secateur.prune from Python"
            ) from error
        if isinstance(error, UnidentifiedImageError):
            raise
        raise UnidentifiedImageError(f"cannot identify image file {str(source)!r}") from error
    with image:
        check_pixels(image)
        yield image


def _starts_as_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits for each colour; Pillow's conversion clips wider values at 255.

    Of 16 bits the upper 8 are kept, as Pillow does for coloured images. PNG and PGM have at most 16
    bits, also if Pillow opens them in its 32-bit mode (PNG before version 10.3). Raises
    `ValueError` if the range of the values is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its values (mode {image.mode}) have no known range: convert it to 8 bits"
        )
    return image.convert("RGB")


def rgb_pixels(image: Image.Image) -> UInt8[Tensor, "rgb height width"]:
    """Return the pixels of an opened image; raises one of `DECODING_ERRORS`."""
    pixels: Tensor = v2.functional.pil_to_tensor(_as_rgb(image))
    return pixels


def index_pixels(image: Image.Image) -> Int[Tensor, "height width"]:
    """Return the values of an opened mask, which holds one number for each pixel.

    Palette images count: their values are the palette's indices. Raises one of `DECODING_ERRORS`.
    """
    values = np.asarray(image)
    if values.ndim != 2:
        raise ValueError("it is in colours, and a mask holds one number for each pixel")
    if values.dtype.kind not in "bui":
        raise ValueError(f"a mask holds whole numbers, and its values are {values.dtype}")
    return torch.from_numpy(values.astype(np.int64))


def decode_all(
    indices: Int[Tensor, "image"],
    find: Callable[[int], tuple[str, Path | io.BytesIO]],
    decode: Callable[[Image.Image], T],
) -> list[T]:
    """Return what `decode` makes of image files, which are read on several threads.

    `find` returns an image's name and its path or bytes. Raises `UnreadableImage` that names every
    image for which `decode` raises one of `DECODING_ERRORS`.
    """
    failed: dict[int, Exception] = {}

    def decode_one(index: int) -> T | None:
        _, source = find(index)
        try:
            with opened_image(source) as image:
                return decode(image)
        except DECODING_ERRORS as error:
            failed[index] = error
            return None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(decode_one, indices.tolist()))
    if failed:
        in_order = [index for index in indices.tolist() if index in failed]
        first = failed[in_order[0]]
        raise UnreadableImage({index: find(index)[0] for index in in_order}, first) from first
    return [result for result in results if result is not None]


def height_and_width(image: Image.Image) -> tuple[int, int]:
    """Return the size of an opened image, which is not decoded for that."""
    return image.height, image.width
