"""Which functions have their arguments and results checked in tests: those that name axes."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jaxtyping
from jaxtyping import AbstractArray, AbstractDtype

_jaxtyped = jaxtyping.jaxtyped


def check_shapes() -> None:
    """Have beartype check functions and dataclasses of the package that name axes of tensors.

    Call it before the first `import secateur`. Checks of every function would take longer than the
    functions themselves, and show what mypy shows: jaxtyping wraps whatever its hook passes to
    `jaxtyped`, so others are not passed to it.
    """
    jaxtyping.jaxtyped = _jaxtyped_if_axes_are_named  # type: ignore[assignment]
    jaxtyping.install_import_hook("secateur", "beartype.beartype")


def _jaxtyped_if_axes_are_named(*, typechecker: object) -> Callable[[Any], Any]:
    def decorate(item: Any) -> Any:
        return _jaxtyped(item, typechecker=typechecker) if _names_axes(item) else item

    return decorate


def _names_axes(item: Any) -> bool:
    if not inspect.isclass(item):
        return _has_axes(item.__annotations__, item.__globals__)
    names = vars(sys.modules[item.__module__])
    return dataclasses.is_dataclass(item) and _has_axes(item.__init__.__annotations__, names)


def _has_axes(annotations: Mapping[str, str], names: Mapping[str, object]) -> bool:
    words = {word for text in annotations.values() for word in re.findall(r"\w+", str(text))}
    return any(_is_tensor_type(names.get(word)) for word in words)


def _is_tensor_type(value: object) -> bool:
    if inspect.isclass(value) and issubclass(value, AbstractArray | AbstractDtype):
        return True
    return any(map(_is_tensor_type, get_args(value)))
