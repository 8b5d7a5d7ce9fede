"""What all sections of a configuration share."""

from __future__ import annotations

from typing import ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the configuration; unknown keys are an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: object, field: ValidationInfo) -> object:
        """Refuse true and false where pydantic would read them as 1 and 0."""
        assert field.field_name is not None
        kind = cls.model_fields[field.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError(f"{value} is not a number, a text or a table of these")
        return value
