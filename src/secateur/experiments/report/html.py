"""Render HTML pages from the templates and scripts of this package."""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of values; text in them is escaped."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    """Return the environment of all pages, which keeps the templates that it has compiled."""
    return Environment(
        loader=PackageLoader("secateur", "experiments/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass(frozen=True)
class Script:
    """The JavaScript of a page. The page's policy allows only this text, by its hash."""

    text: Markup
    shows_files: bool = False
    """Whether the page shows picture files beside it."""

    @property
    def policy(self) -> str:
        """The content security policy: run this script, show the page's pictures, nothing else."""
        digest = base64.b64encode(hashlib.sha256(self.text.encode()).digest()).decode()
        images = "data: 'self' file:" if self.shows_files else "data:"
        return (
            f"default-src 'none'; img-src {images}; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )


def read_script(*names: str, shows_files: bool = False) -> Script:
    """Return the named files of this package, joined; for `shows_files` see `Script`."""
    files = (resources.files(__package__).joinpath(name) for name in names)
    text = Markup("").join(Markup(file.read_text(encoding="utf-8")) for file in files)
    return Script(text, shows_files)
