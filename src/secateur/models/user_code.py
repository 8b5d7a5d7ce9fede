"""Networks and criteria of the user's own: `path/to/file.py:factory`.

Such a file is run. Only what the user names is: no file that secateur reads may name one to run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import UnknownName, UsageError


def is_user_code(name: str) -> bool:
    """Whether a name is one of a file and a factory in it."""
    return name.rpartition(":")[0].endswith(".py")


def check_file(name: str, kind: str) -> None:
    """Raises `UsageError` where there is no such file to take a `kind` of thing from."""
    path, _, factory = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"no file {path} to take the {kind} {factory!r} from")


def find(name: str, kind: str) -> Callable[..., Any]:
    """The factory, of a `kind` of thing, from its file, which is run.

    Raises `UsageError` where it can't be, and `UnknownName` where there is no such factory.
    """
    check_file(name, kind)
    path, _, factory = name.rpartition(":")
    module_name = f"secateur_own_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses, among others, look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's: it may raise anything
        del sys.modules[module_name]
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} can't be run: {type(error).__name__}: {reason}") from error
    build = getattr(module, factory, None)
    if not callable(build):
        callables = [name for name in vars(module) if callable(getattr(module, name))]
        raise UnknownName(f"factory in {path}", factory, callables)
    found: Callable[..., Any] = build
    return found


def call(name: str, build: Callable[..., Any], **options: object) -> object:
    """What the factory gives; raises `UsageError` with what it raises."""
    try:
        return build(**options)
    except Exception as error:  # the user's, too
        reason = " ".join(str(error).split())
        raise UsageError(f"{name} failed: {type(error).__name__}: {reason}") from error
