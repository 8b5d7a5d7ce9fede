"""Write docs/reference/configuration.md from the sections: `python bench/configuration.py`."""

from __future__ import annotations

from pydantic_core import PydanticUndefined

from rows import ROOT
from secateur.config import BaseConfig, RunConfig, Section
from tables import with_table

PAGE = ROOT / "docs" / "reference" / "configuration.md"


def table(section: type[Section]) -> str:
    """A line a key: its default, and what it does."""
    lines = ["| key | default | what |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        shown = "needed" if field.default is PydanticUndefined else _toml(field.default)
        what = " ".join((field.description or "").split())
        lines.append(f"| `{name}` | {shown} | {what} |")
    return "\n".join(lines)


def _toml(value: object) -> str:
    """Return a default as TOML; None, which TOML leaves out, is a dash."""
    return "–" if value is None else f"`{_plain(value)}`"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def sections() -> dict[str, type[Section]]:
    """Return the sections by their name in a file."""
    by_name = {}
    for config in (RunConfig, BaseConfig):
        for name, field in config.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                by_name[name] = field.annotation
    return by_name


def page(text: str) -> str:
    """Return the page with current tables."""
    for name, section in sections().items():
        text = with_table(text, name, table(section))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
