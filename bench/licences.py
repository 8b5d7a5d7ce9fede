"""Write the page of licences: those that the packages of pyproject.toml state themselves.

    python bench/licences.py

The table in docs/reference/licences.md is written from the metadata of the installed packages
(`make setup`).
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from dependencies import Dependency, direct
from tables import with_table

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "licences.md"
NAME = "bench/licences.py"
PURPOSES = {
    "torch": "networks and all arithmetic on them",
    "torchvision": "networks by name, image transforms",
    "accelerate": "training on several devices and processes",
    "psutil": "free memory",
    "numpy": "arrays",
    "scipy": "statistics of benchmarks",
    "pillow": "reads and writes images",
    "safetensors": "weights in files",
    "filelock": "one run at a time in a folder",
    "pydantic": "validates configurations and files",
    "jaxtyping": "named axes in signatures",
    "typer": "the command line",
    "rich": "the terminal",
    "jinja2": "the report's pages",
    "matplotlib": "charts as PNG and SVG",
    "tomli-w": "writes `config.toml`",
    "timm": "networks by name",
    "onnx": "ONNX files",
    "onnxruntime": "checks and times ONNX files",
    "onnxscript": "torch's ONNX exporter",
    "datasets": "Hugging Face data sets",
    "tensorboard": "training curves",
    "scikit-learn": "NMF for concepts, handwritten digits",
    "torch-pruning": "compared with in benches",
    "furo": "the documentation's theme",
    "myst-nb": "Markdown and notebooks in the documentation",
    "sphinx": "builds the documentation",
    "sphinx-copybutton": "copies examples from the documentation",
    "axe-playwright-python": "tests: accessibility of pages",
    "beartype": "tests: types and shapes",
    "hatchling": "builds wheel and sdist",
    "hypothesis": "tests: random cases",
    "ipykernel": "tests: runs the notebook",
    "mypy": "checks types",
    "nbclient": "tests: runs the notebook",
    "packaging": "tests: bounds of dependencies",
    "playwright": "tests: pages in a browser",
    "pyright": "checks the types of public names",
    "pytest": "tests",
    "pytest-xdist": "tests, one process per core",
    "ruff": "format and lint",
}
NAMES = {
    "apache": "Apache-2.0",
    "mit": "MIT",
    "mozilla public license 2.0": "MPL-2.0",
    "python software foundation": "Python Software Foundation License",
}
"""How a licence's name begins, in a classifier or the older field -> what it is called here."""
TEXTS = {
    "BSD-3-Clause": "Redistribution and use in source and binary forms.*Neither the name",
    "BSD-2-Clause": "Redistribution and use in source and binary forms",
    "MIT": "Permission is hereby granted, free of charge, to any person",
}
"""Licence -> a part of its text; the first one that is found counts."""


def licence(name: str) -> str:
    """What an installed package says of its licence: an SPDX expression where it can be told.

    New packages state an expression. Older ones have classifiers or a field, of an SPDX identifier
    or of any text; which BSD licence is meant, and everything where they say nothing, is told from
    the licence's text.
    """
    found = metadata.metadata(name)
    if expressions := found.get_all("License-Expression"):
        return str(expressions[0])
    field = " ".join(found.get_all("License") or [])
    if re.fullmatch(r"[A-Z]\w+(-[\w.]+)+", field):
        return field
    classifiers = [each.split(" :: ") for each in found.get_all("Classifier") or []]
    for said in (*(each[-1] for each in classifiers if each[0] == "License"), field):
        for beginning, known in NAMES.items():
            if said.lower().startswith(beginning):
                return known
    text = " ".join([field, *_texts(name)])
    for known, part in TEXTS.items():
        if re.search(part, text, re.DOTALL):
            return known
    raise LookupError(f"{name} doesn't say what its licence is")


def _texts(name: str) -> list[str]:
    """The licences that lie beside an installed package's metadata."""
    files = [each for each in metadata.files(name) or [] if each.parts[0].endswith(".dist-info")]
    return [each.read_text() for each in files if re.match("licen[cs]e", each.name.lower())]


def table() -> str:
    """A line for each direct dependency."""
    lines = ["| package | version | licence | extra | what for |", "|---|---|---|---|---|"]
    for each in direct():
        version = metadata.version(each.name)
        cells = [each.name, version, licence(each.name), _extras(each), PURPOSES[each.name]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _extras(dependency: Dependency) -> str:
    return ", ".join(f"`{each}`" for each in dependency.extras) or "–"


def differences(page: str) -> list[str]:
    """What the page doesn't say, or says otherwise than the installed packages: a line each.

    Packages that are older than those the page was written with are not asked for their licence:
    some state the same one in other words.
    """
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    shown = {name: rest for name, *rest in lines if name != "package"}
    found = []
    for each in direct():
        if each.name not in shown:
            found.append(f"{each.name} is not on the page")
            continue
        version, stated, *rest = shown.pop(each.name)
        is_asked = Version(metadata.version(each.name)) >= Version(version)
        if is_asked and licence(each.name) != stated:
            found.append(f"{each.name}: {stated} on the page, {licence(each.name)} installed")
        if rest != [_extras(each), PURPOSES[each.name]]:
            found.append(f"{each.name}: another extra or purpose on the page")
    return found + [f"{name} is no dependency" for name in shown]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), NAME, table()))
