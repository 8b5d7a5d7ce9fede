"""Words that a shell may complete; none of them needs torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from secateur.config import BUILT_IN_NETWORKS, CONCEPT_SOURCES, CRITERIA, DATA_FORMS


def networks(incomplete: str) -> list[str]:
    """Return the networks that start with a text."""
    published = (f"torchvision:{name}" for name in torchvision_names())
    return _starting((*BUILT_IN_NETWORKS, *published), incomplete)


def criteria(incomplete: str) -> list[str]:
    """Return the criteria that start with a text."""
    return _starting(CRITERIA, incomplete)


def concept_sources(incomplete: str) -> list[str]:
    """Return the concept sources that start with a text."""
    return _starting(("auto", *CONCEPT_SOURCES), incomplete)


def data_sets(incomplete: str) -> list[str]:
    """Return the kinds of data sets that start with a text."""
    return _starting((form.partition(":")[0] for form in DATA_FORMS), incomplete)


def devices(incomplete: str) -> list[str]:
    """Return the usual names of devices that start with a text."""
    return _starting(("auto", "cpu", "cuda", "mps", "xpu"), incomplete)


def torchvision_names() -> list[str]:
    """Return torchvision's classifiers as its sources register them: importing it takes seconds."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return []
    names: set[str] = set()
    for path in (Path(package.origin).parent / "models").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        names.update(re.findall(r"@register_model\(\)\n(?:@.*\n|\s.*\n|\)\n)*def (\w+)\(", text))
    return sorted(names)


def _starting(names: Iterable[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]
