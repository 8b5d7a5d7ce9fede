"""Which functions have their arguments checked in tests: those that name axes of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with beartype's checks if it names axes, and as it is otherwise.

    Checks of every function would take half of the time that the package itself takes, and show
    what mypy shows.
    """
    annotations = getattr(function, "__annotations__", {}).values()
    return beartype(function) if any(map(_names_axes, annotations)) else function


def _names_axes(annotation: object) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_names_axes, get_args(annotation)))
