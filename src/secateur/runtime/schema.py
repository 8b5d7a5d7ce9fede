"""Documents of our own: JSON of a known schema version."""

from __future__ import annotations

import json
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from secateur.errors import RunFolderError


class VersionedRecord(BaseModel):
    """A document or a part of one; unknown keys are an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


VALIDATOR = "Value error, "
"""What pydantic writes before the words of our own validators."""
AnyDocument = TypeVar("AnyDocument", bound=BaseModel)


def describe_error(error: ErrorDetails) -> str:
    """What is wrong, in one line, by the first of pydantic's errors."""
    return " ".join(error["msg"].removeprefix(VALIDATOR).split())


def parse_record(
    kind: type[AnyDocument], text: str | bytes, version: int, name: str
) -> AnyDocument:
    """The document of a schema version that a text holds.

    Raises `RunFolderError`, which calls it by `name`, where the text is none.
    """
    try:
        found = json.loads(text)["schema_version"]
        if found != version:
            advice = ""
            if isinstance(found, int) and found < version:
                advice = ": an older release wrote it; write it again with this one"
            raise RunFolderError(
                f"{name} has schema version {found}, and this secateur reads {version}{advice}"
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
    """A part of the result; unknown keys are an error. The loss of a broken network is `"NaN"`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )
