"""`secateur models`."""

from __future__ import annotations

import json

from secateur.cli import completion, options
from secateur.config import CONCEPT_SOURCES, CRITERIA, DATA_FORMS


def models(as_json: options.Json = False) -> None:
    """List the networks, criteria, concept sources and kinds of data sets."""
    names = {
        "networks": completion.networks(""),
        "criteria": list(CRITERIA),
        "concepts": list(CONCEPT_SOURCES),
        "data": list(DATA_FORMS),
    }
    if as_json:
        print(json.dumps(names, indent=1))
        return

    from secateur.cli import console

    for title, listed in names.items():
        console.out().print(f"[bold]{title}[/]")
        console.out().print("  " + ", ".join(listed), highlight=False)
    console.say("also timm:NAME (extra: timm) and path/to/file.py:factory")
