"""How much of a file that someone else may have written is read before anything is believed of it.

Sizes are looked at before a byte is read; texts are bounded, since what a parser makes of one takes
many times its length; images and weights say how large they are in their first bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

from PIL import Image

from secateur.errors import SecateurError

MIB = 2**20
TEXT = 64 * MIB
"""Of results and programs, which grow with the network, and of a data set's tables."""
SMALL_TEXT = MIB
"""Of configurations and manifests."""
PLAN_TEXT = 8 * MIB
"""Of plans: more than a million channels."""
HEADER = 16 * MIB
"""Of the header of a safetensors file, in which every tensor takes about a hundred bytes."""
PIXELS = 89_478_485
"""Of an image, of all its rows and columns: Pillow's own bound, above which it warns."""
DOTS = 64
"""Parts of a dotted key in TOML: its parser takes the square of their number."""


def read_bounded(path: Path, most: int, error: type[SecateurError]) -> bytes:
    """The bytes of a file that has at most so many.

    Raises `error`, which names the file, where it is larger or can't be read.
    """
    try:
        size = path.stat().st_size
        if size > most:
            raise error(
                f"{path} can't be read: it has {size} bytes, and at most {most} are expected there"
            )
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as cause:
        raise error(f"{path} can't be read: {cause}") from cause
    if len(content) > most:  # a pipe, or a file that has grown
        raise error(f"{path} can't be read: it has more than {most} bytes")
    return content


def read_unzipped(path: Path, most: int, error: type[SecateurError]) -> bytes:
    """The bytes of a file, decompressed where its name ends in `.gz`: at most so many.

    Raises `error`, which names the file, where there are more or it can't be read.
    """
    if path.suffix != ".gz":
        return read_bounded(path, most, error)
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as cause:
        raise error(f"{path} can't be read: {cause}") from cause
    if len(content) > most:
        raise error(f"{path} can't be read: it unpacks to more than {most} bytes")
    return content


def check_dots(text: str) -> None:
    """Raises `ValueError` where a key of a TOML text has more than `DOTS` parts."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") >= DOTS and _longest_chain(line) >= DOTS:
            raise ValueError(f"line {number} nests too deeply")


def _longest_chain(line: str) -> int:
    """The most dots outside of quotes between which there is nothing that ends a key."""
    longest = chain = 0
    quote, is_escaped = "", False
    for letter in line:
        if quote:
            is_closing = letter == quote and not is_escaped
            is_escaped = quote == '"' and letter == "\\" and not is_escaped
            quote = "" if is_closing else quote
        elif letter in "\"'":
            quote = letter
        elif letter == ".":
            chain += 1
            longest = max(longest, chain)
        elif letter in ",=[]{}#":
            chain = 0
    return longest


def check_safetensors(path: Path) -> None:
    """Raises `ValueError` where the header of a safetensors file is larger than it may be.

    Its first eight bytes say so. Raises `OSError`.
    """
    with path.open("rb") as file:
        first = file.read(8)
    if len(first) < 8:
        raise ValueError("it is shorter than the header of a safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > min(HEADER, path.stat().st_size - 8):
        raise ValueError(f"its header claims {length} bytes")


def inside(folder: Path, name: str, error: type[SecateurError]) -> Path:
    """The path of a file that a table names; raises `error` where it lies outside of the folder."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        raise error(f"a table in {folder.parent} names {name!r}, which lies outside of {folder}")
    return folder / place


def check_pixels(image: Image.Image) -> None:
    """Raises `ValueError` where an image that has been opened and not decoded is too large."""
    if image.width * image.height > PIXELS:
        raise ValueError(
            f"{image.width} × {image.height} pixels, and at most {PIXELS:,} are decoded"
        )
