"""What pyproject.toml asks for by name, and whether the oldest releases it allows are installed.

    python bench/dependencies.py

names the packages that are newer than their lower bound, and fails if there are any; for
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
NOT_IN_TESTS = ("lint", "zoo")
"""Extras that are not installed for the tests: what checks the source, networks of the bench."""
LIBRARIES = ("naming", "smp", "transformers", "ultralytics", "yolox", "libraries")
"""Extras that the tests with the oldest releases go without."""


@dataclass(frozen=True)
class Dependency:
    """A package that pyproject.toml names."""

    name: str
    """In its canonical spelling."""
    specifier: SpecifierSet
    extras: tuple[str, ...]
    """Extras that need it; empty if it is always installed."""

    def lower_bound(self) -> str | None:
        """Return the oldest version allowed."""
        bounds = [bound.version for bound in self.specifier if bound.operator in (">=", "==")]
        return bounds[0] if bounds else None


def direct() -> list[Dependency]:
    """Return the direct dependencies, in the order of pyproject.toml."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = [("", project["dependencies"]), *project["optional-dependencies"].items()]
    by_name: dict[str, Dependency] = {}
    for extra, lines in requirements:
        if extra in NOT_IN_TESTS:
            continue
        for requirement in map(Requirement, lines):
            name = canonicalize_name(requirement.name)
            if name == OURS:
                continue
            before = by_name.get(name, Dependency(name, SpecifierSet(), ()))
            extras = (*before.extras, extra) if extra else before.extras
            specifier = before.specifier & requirement.specifier
            by_name[name] = Dependency(name, specifier, extras)
    return list(by_name.values())


def above_lower_bound() -> list[str]:
    """Return a line for each package that is newer than the oldest release its bound allows.

    A bound of fewer parts covers every release that starts with it: the first of timm 1.0 was
    1.0.3.
    """
    tried = [
        package
        for package in direct()
        if not package.extras or not set(package.extras) <= set(LIBRARIES)
    ]
    versions = {package.name: metadata.version(package.name) for package in tried}
    return [
        f"{package.name} {versions[package.name]} is newer than its bound {package.specifier}"
        for package in tried
        if versions[package.name] not in SpecifierSet(f"=={package.lower_bound()}.*")
    ]


if __name__ == "__main__":
    sys.exit("\n".join(above_lower_bound()) or None)
