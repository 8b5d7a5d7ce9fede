"""The size of images as a value of the configuration."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PositiveInt


def parse_image_size(value: object) -> object:
    """Return a text such as `224`, `256,352` or `256x352` as numbers, other values as they are.

    Two numbers are the height and the width; equal ones are a side. Raises `ValueError`.
    """
    if isinstance(value, str):
        parts = re.split(r"[,x×]", value)
        if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"{value!r} is not a size: give a side, as 224, or height and width, as 256,352"
            )
        value = [int(part) for part in parts]
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        return value[0]
    return value


ImageSize = Annotated[
    PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(parse_image_size)
]
"""Side of a square, or height and width, in pixels."""
