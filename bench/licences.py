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
    "pyyaml": "reads the tables of YOLO's data sets",
    "jaxtyping": "named axes in signatures",
    "typer": "the command line",
    "rich": "the terminal",
    "jinja2": "the report's pages",
    "matplotlib": "charts as PNG and SVG",
    "tomli-w": "writes `config.toml`",
    "timm": "networks by name",
    "onnx": "ONNX files",
    "onnxruntime": "checks and times ONNX files",
    "openvino": "times networks and writes its format",
    "onnxscript": "torch's ONNX exporter",
    "datasets": "Hugging Face data sets",
    "huggingface-hub": "networks on the Hugging Face Hub",
    "tensorboard": "training curves",
    "scikit-learn": "NMF for concepts, handwritten digits",
    "torchmetrics": "PSNR and SSIM",
    "pycocotools": "COCO's average precision",
    "ultralytics": "its YOLO networks",
    "pixeltable-yolox": "YOLOX networks",
    "segmentation-models-pytorch": "its networks",
    "transformers": "its networks",
    "open-clip-torch": "image–text models, which name filters",
    "monai": "its networks; tests",
    "lightning": "tests: its trainer",
    "braindecode": "networks of a bench",
    "pytorchcv": "networks of a bench",
    "seisbench": "networks of a bench",
    "spandrel": "networks of a bench",
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
    "freebsd": "BSD-2-Clause",
    "mit": "MIT",
    "mozilla public license 2.0": "MPL-2.0",
    "python software foundation": "Python Software Foundation License",
}
"""Start of a licence's name, in a classifier or the older field -> its name here."""
TEXTS = {
    "BSD-3-Clause": "Redistribution and use in source and binary forms.*Neither the name",
    "BSD-2-Clause": "Redistribution and use in source and binary forms",
    "MIT": "Permission is hereby granted, free of charge, to any person",
}
"""Licence -> a part of its text; the first match counts."""


def licence(name: str) -> str:
    """Return the licence of an installed package, as an SPDX expression if possible.

    New packages state an expression. Older ones have classifiers or a field with an SPDX identifier
    or free text. Which BSD licence it is, or any licence that is not stated, is found from the
    licence's text.
    """
    fields = metadata.metadata(name)
    if expressions := fields.get_all("License-Expression"):
        return str(expressions[0])
    field = " ".join(fields.get_all("License") or [])
    if re.fullmatch(r"[A-Z]\w+(-[\w.]+)+", field):
        return field
    classifiers = [line.split(" :: ") for line in fields.get_all("Classifier") or []]
    for stated in (*(parts[-1] for parts in classifiers if parts[0] == "License"), field):
        for beginning, known in NAMES.items():
            if stated.lower().startswith(beginning):
                return known
    text = " ".join([field, *_texts(name)])
    for known, part in TEXTS.items():
        if re.search(part, text, re.DOTALL):
            return known
    raise LookupError(f"{name} doesn't say what its licence is")


def _texts(name: str) -> list[str]:
    """Return the licence files beside an installed package's metadata."""
    files = [file for file in metadata.files(name) or [] if file.parts[0].endswith(".dist-info")]
    return [file.read_text() for file in files if re.match("licen[cs]e", file.name.lower())]


def table() -> str:
    """Return a table with one line for each direct dependency."""
    lines = ["| package | version | licence | extra | what for |", "|---|---|---|---|---|"]
    for package in direct():
        version = metadata.version(package.name)
        cells = [
            package.name,
            version,
            licence(package.name),
            _extras(package),
            PURPOSES[package.name],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _extras(dependency: Dependency) -> str:
    return ", ".join(f"`{extra}`" for extra in dependency.extras) or "–"


def differences(page: str) -> list[str]:
    """Return a line for each difference between the page and the installed packages.

    The licences of packages older than those on the page are not compared: some state the same one
    in other words.
    """
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    shown = {name: rest for name, *rest in lines if name != "package"}
    wrong = []
    for package in direct():
        if package.name not in shown:
            wrong.append(f"{package.name} is not on the page")
            continue
        version, stated, *rest = shown.pop(package.name)
        is_comparable = Version(metadata.version(package.name)) >= Version(version)
        if is_comparable and licence(package.name) != stated:
            wrong.append(f"{package.name}: {stated} on the page, {licence(package.name)} installed")
        if rest != [_extras(package), PURPOSES[package.name]]:
            wrong.append(f"{package.name}: another extra or purpose on the page")
    return wrong + [f"{name} is no dependency" for name in shown]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), NAME, table()))
