"""What pyproject.toml asks for by name, and whether the oldest releases it allows are installed.

    python bench/dependencies.py

names the packages that are newer than their lower bound, and fails where there are any; for
`scripts/test-lowest`.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
OURS = "secateur"
LINT = "lint"
"""The extra of what checks the source alone, and is not installed for the tests."""


@dataclass(frozen=True)
class Dependency:
    """A package that pyproject.toml names."""

    name: str
    """In its canonical spelling."""
    specifier: SpecifierSet
    extras: tuple[str, ...]
    """Those that ask for it; none where it is always installed."""

    def lower_bound(self) -> str | None:
        """The oldest version that will do."""
        bounds = [each.version for each in self.specifier if each.operator in (">=", "==")]
        return bounds[0] if bounds else None


def direct() -> list[Dependency]:
    """The direct dependencies, in the order of pyproject.toml."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    asked = [("", project["dependencies"]), *project["optional-dependencies"].items()]
    found: dict[str, Dependency] = {}
    for extra, lines in asked:
        if extra == LINT:
            continue
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            if name == OURS:
                continue
            before = found.get(name, Dependency(name, SpecifierSet(), ()))
            extras = (*before.extras, extra) if extra else before.extras
            specifier = before.specifier & requirement.specifier
            found[name] = Dependency(name, specifier, extras)
    return list(found.values())


def above_lower_bound() -> list[str]:
    """What is installed in a newer release than the oldest that its bound allows: a line each.

    A bound of fewer parts stands for all that begin so: the first release of timm 1.0 was 1.0.3.
    """
    versions = {each.name: metadata.version(each.name) for each in direct()}
    return [
        f"{each.name} {versions[each.name]} is newer than its bound {each.specifier}"
        for each in direct()
        if versions[each.name] not in SpecifierSet(f"=={each.lower_bound()}.*")
    ]


if __name__ == "__main__":
    sys.exit("\n".join(above_lower_bound()) or None)
