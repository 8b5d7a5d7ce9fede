"""Networks and criteria from user code: `path/to/file.py:factory`.

The file is run, and may import the files around it: see `user_modules`. Only a name from the user
may do that: no file that secateur reads can name code to run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.models.user_modules import UserModules
from secateur.runtime.errors import UnknownName, UsageError


def is_user_code(name: str) -> bool:
    """Return whether a name is that of a file and a factory in it."""
    return name.rpartition(":")[0].endswith(".py")


def check_file(name: str, kind: str) -> None:
    """Raise `UsageError` if there is no such file; `kind` says what it should define."""
    path, _, factory = name.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"no file {path} to take the {kind} {factory!r} from")


def defined_names(path: Path) -> list[str]:
    """Return the functions and classes that a file defines, without running it."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def find(name: str, kind: str) -> Callable[..., Any]:
    """Run the file and return its factory; `kind` says what that builds, for errors.

    Raises `UsageError` if the file can't be run, and `UnknownName` if it has no such factory.
    """
    check_file(name, kind)
    path, _, factory = name.rpartition(":")
    modules = UserModules(Path(path))
    try:
        module = modules.run()
    except (Exception, SystemExit) as error:  # user code may raise anything
        modules.remove()
        reason = " ".join(str(error).split()).replace(f"{modules.root}.", "")
        raise UsageError(f"{path} can't be run: {type(error).__name__}: {reason}") from error
    build = getattr(module, factory, None)
    if not callable(build):
        callables = [name for name in vars(module) if callable(getattr(module, name))]
        raise UnknownName(f"factory in {path}", factory, callables)
    factory_function: Callable[..., Any] = build
    return factory_function


def call(name: str, build: Callable[..., Any], **options: object) -> object:
    """Call the factory and return what it builds; raises `UsageError` for anything it raises."""
    try:
        return build(**options)
    except Exception as error:  # user code may raise anything
        reason = " ".join(str(error).split())
        advice = ""
        if isinstance(error, TypeError) and "required positional argument" in reason:
            advice = ": name a function that needs no argument but num_classes"
        raise UsageError(f"{name} failed: {type(error).__name__}: {reason}{advice}") from error
