"""Tables of a configuration: read from TOML, and their keys."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from secateur.runtime.errors import UsageError
from secateur.runtime.input_limits import SMALL_TEXT, check_dots, read_bounded


def keys_of(kind: type[BaseModel]) -> list[str]:
    """Return every key of a configuration, with its section."""
    keys = []
    for name, field in kind.model_fields.items():
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{key}" for key in keys_of(section)]
        else:
            keys.append(name)
    return keys


def nearest_key(name: str, kind: type[BaseModel]) -> str | None:
    """Return the key of a configuration, with its section, that a name is most like."""
    keys = [key for key in keys_of(kind) if "." in key]
    same = [key for key in keys if key.rpartition(".")[2] == name]
    near = same or difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    return near[0] if near else None


def read_tables(path: Path, content: str = "configuration") -> dict[str, Any]:
    """Return the tables of a TOML file; error messages call it `content`. Raises `UsageError`."""
    try:
        text = read_bounded(path, SMALL_TEXT, UsageError).decode("utf-8")
        check_dots(text)
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"the {content} {path} can't be read: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply for a secateur {content}") from error
    except ValueError as error:
        example = "" if path.suffix == ".toml" else '; write it as [model] name = "resnet20"'
        raise UsageError(f"{path} is not TOML: {error}{example}") from error
