"""Limit how much is read from files that someone else may have written.

Sizes are checked before a byte is read. Texts are bounded because parsing one takes many times its
length; images and safetensors files declare their size in their first bytes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

from PIL import Image

from secateur.runtime.errors import SecateurError
from secateur.runtime.local_path import check_local

MIB = 2**20
GIB = 2**30
"""Bytes of annotations of objects: COCO's largest file has 470 million."""
TEXT = 64 * MIB
"""Bytes of results and exported programs, which grow with the network, and of data set tables."""
SMALL_TEXT = MIB
"""Bytes of configurations and manifests."""
PLAN_TEXT = 8 * MIB
"""Bytes of plans: enough for more than a million channels."""
HEADER = 16 * MIB
"""Bytes of a safetensors header, which takes about a hundred per tensor."""
PIXELS = 89_478_485
"""Pixels of an image: the limit above which Pillow warns."""
DOTS = 64
"""Parts of a dotted key in TOML: the parser's time grows with the square of their number."""


def describe_os_error(path: Path, error: OSError) -> str:
    """Return in one line why the file can't be read; raises `UsageError` if it is an address."""
    check_local(path)
    if isinstance(error, FileNotFoundError):
        return f"no file {path}"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, and a file is needed there"
    return f"{path} can't be read: {(error.strerror or str(error)).lower()}"


def read_bounded(path: Path, most: int, error: type[SecateurError]) -> bytes:
    """Return the bytes of a file.

    Raises `error`, which names the file, if it has more than `most` bytes or can't be read.
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
        raise error(describe_os_error(path, cause)) from cause
    if len(content) > most:  # a pipe, or a file that has grown
        raise error(f"{path} can't be read: it has more than {most} bytes")
    return content


def read_unzipped(path: Path, most: int, error: type[SecateurError]) -> bytes:
    """Return the bytes of a file, decompressed if its name ends in `.gz`.

    Raises `error`, which names the file, if there are more than `most` or it can't be read.
    """
    if path.suffix != ".gz":
        return read_bounded(path, most, error)
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except OSError as cause:
        raise error(describe_os_error(path, cause)) from cause
    except (EOFError, zlib.error) as cause:
        raise error(f"{path} can't be read: {cause}") from cause
    if len(content) > most:
        raise error(f"{path} can't be read: it unpacks to more than {most} bytes")
    return content


def check_dots(text: str) -> None:
    """Raise `ValueError` if a key of a TOML text has more than `DOTS` parts."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") >= DOTS and _longest_chain(line) >= DOTS:
            raise ValueError(f"line {number} nests too deeply")


def _longest_chain(line: str) -> int:
    """Return the most dots in one key of a line of TOML; dots in quotes don't count."""
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
    """Raise `ValueError` if a safetensors file is too short or declares too large a header.

    Also raises `OSError`.
    """
    with path.open("rb") as file:
        first = file.read(8)
    if len(first) < 8:
        raise ValueError("it is shorter than the header of a safetensors file")
    (length,) = struct.unpack("<Q", first)
    if length > min(HEADER, path.stat().st_size - 8):
        raise ValueError(f"its header claims {length} bytes")


def inside(folder: Path, name: str, error: type[SecateurError]) -> Path:
    """Return the path of a file that a table names; raises `error` if it is outside the folder."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        raise error(f"a table in {folder.parent} names {name!r}, which lies outside of {folder}")
    return folder / place


def check_pixels(image: Image.Image) -> None:
    """Raise `ValueError` if an image that is opened but not yet decoded is too large."""
    if image.width * image.height > PIXELS:
        raise ValueError(
            f"{image.width} × {image.height} pixels, and at most {PIXELS:,} are decoded"
        )
