"""Image files that can't be read: an error that names them or, where asked for, left out."""

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
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from secateur.errors import UnreadableImage
from secateur.runtime.input_limits import check_pixels

T = TypeVar("T")

DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error),
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
"""What Pillow raises over damaged files, depending on the format and on what is damaged."""


class Unreadable:
    """Counts the files that were left out, each once however often it was asked for."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Called from the threads that read ahead; a set takes that."""
        self._names.update(names)

    @property
    def names(self) -> tuple[str, ...]:
        """As they were given, sorted."""
        return tuple(sorted(self._names))


def read_batch(
    read: Callable[[Int[Tensor, "image"]], T],
    indices: Int[Tensor, "image"],
    unreadable: Unreadable | None = None,
) -> tuple[Int[Tensor, "readable"], T] | None:
    """The numbers of the images that can be read, in order, and what `read` gives for them.

    `read` is asked for all of `indices`. Where it raises `UnreadableImage`, that goes on to the
    caller, unless there is an `Unreadable` to note the files in: then it is asked for the rest.
    None where nothing is left.
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
    """An image that is open and not decoded yet; raises one of `DAMAGE`, for a huge one, too."""
    with Image.open(source) as image:
        check_pixels(image)
        yield image


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image with 8 bits a colour; Pillow's own conversion clips more bits at 255.

    Of 16 bits the upper 8 are taken, as Pillow does in coloured images. PNG and PGM have no more,
    also where Pillow opens them with the mode of 32 (PNG before its version 10.3). Raises
    `ValueError` where the range of the values is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"its values (mode {image.mode}) have no known range: convert it to 8 bits"
        )
    return image.convert("RGB")


def decode_all(
    indices: Int[Tensor, "image"],
    find: Callable[[int], tuple[str, Path | io.BytesIO]],
    prepare: Callable[[UInt8[Tensor, "rgb height width"]], Tensor],
) -> list[Tensor]:
    """The prepared pixels of images, decoded on several threads.

    `find` gives an image's name, and where its bytes are. Raises `UnreadableImage` with every image
    that can't be decoded.
    """

    def decode(index: int) -> Tensor | Exception:
        _, source = find(index)
        try:
            with opened_image(source) as image:
                pixels: Tensor = v2.functional.pil_to_tensor(_as_rgb(image))
        except DECODING_ERRORS as error:
            return error
        return prepare(pixels)

    numbers = indices.tolist()
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(decode, numbers))
    failed = {
        number: result
        for number, result in zip(numbers, found, strict=True)
        if isinstance(result, Exception)
    }
    if failed:
        first = next(iter(failed.values()))
        raise UnreadableImage({number: find(number)[0] for number in failed}, first) from first
    return [result for result in found if isinstance(result, Tensor)]
