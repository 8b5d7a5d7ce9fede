"""`secateur models`."""

from __future__ import annotations

import json
from typing import get_args

from secateur.cli import completion, options
from secateur.config import (
    CONCEPT_SOURCES,
    CRITERIA,
    DATA_FORMS,
    LIBRARY_NETWORKS,
    METRICS,
    TaskKind,
)


def models(as_json: options.Json = False) -> None:
    """List the networks, criteria, concept sources and kinds of data sets."""
    names = {
        "networks": completion.networks(""),
        "tasks": list(get_args(TaskKind)),
        "metrics": list(METRICS),
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
    libraries = ", ".join(LIBRARY_NETWORKS)
    console.say(f"also {libraries} (each with an extra of that name) and path/to/file.py:factory")
