"""Read and validate secateur's JSON files, which carry a schema version."""

from __future__ import annotations

import json
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from secateur.runtime.errors import RunFolderError


class VersionedRecord(BaseModel):
    """A file's content or a part of it; unknown keys are an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


VALIDATOR = "Value error, "
"""Prefix that pydantic puts before the messages of our own validators."""
AnyRecord = TypeVar("AnyRecord", bound=BaseModel)
LONGEST_VALUE = 40
"""Characters of a value that a message shows."""


EXPECTED = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
    "literal_error": "{expected}",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text, in quotes in a TOML file",
    "tuple_type": "a list, such as [1, 2]",
    "list_type": "a list, such as [1, 2]",
    "dict_type": "a table",
    "model_type": "a table",
}
"""What a value must be, by the type of pydantic's error."""


def describe_error(error: ErrorDetails) -> str:
    """Return what one of pydantic's errors asks for, in one line."""
    template = EXPECTED.get(error["type"])
    if template is None:
        return " ".join(error["msg"].removeprefix(VALIDATOR).split())
    value = _text_of(error["input"])
    shown = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}…"
    limits = {name: _text_of(limit) for name, limit in error.get("ctx", {}).items()}
    if "expected" in limits:
        limits["expected"] = error["ctx"]["expected"]
    return f"must be {template.format(**limits)}, not {shown}"


def _text_of(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def parse_record(kind: type[AnyRecord], text: str | bytes, version: int, name: str) -> AnyRecord:
    """Return the record in a JSON text.

    Raises `RunFolderError`, whose message calls the text `name`, if the text is not such a record
    or has another schema version.
    """
    try:
        text_version = json.loads(text)["schema_version"]
        if text_version != version:
            advice = ""
            if isinstance(text_version, int) and text_version < version:
                advice = ": an older release wrote it; write it again with this one"
            raise RunFolderError(
                f"{name} has schema version {text_version}, and this secateur reads "
                f"{version}{advice}"
            )
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}." for part in first["loc"])[:-1]
        place = f"{key}: " if key else ""
        raise RunFolderError(f"{name} can't be read: {place}{describe_error(first)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{name} can't be read: {error!r}") from error


class Record(BaseModel):
    """A part of a result; unknown keys are an error. Non-finite numbers are written as strings."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )
