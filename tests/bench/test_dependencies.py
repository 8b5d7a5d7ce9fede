"""What the package needs: nothing of an extra without it, and lower bounds."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.utils import canonicalize_name

import dependencies

IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # a module that is None can't be imported
import secateur
for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
    importlib.import_module(module.name)
"""


@pytest.mark.slow
def test_every_module_is_imported_without_extras() -> None:
    extra = {dependency.name for dependency in dependencies.direct() if dependency.extras}
    extra -= {
        dependency.name
        for dependency in dependencies.direct()
        if dependency.extras in [("dev",), ("docs",)]
    }
    modules = [
        module
        for module, distributions in metadata.packages_distributions().items()
        if extra & {canonicalize_name(name) for name in distributions}
    ]
    assert {"onnx", "sklearn", "timm", "torch_pruning"} <= set(modules)
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_bounds_are_lower_ones() -> None:
    """Except Torch-Pruning, which benches compare with in a pinned release."""
    kinds = {
        dependency.name: {s.operator for s in dependency.specifier}
        for dependency in dependencies.direct()
    }
    assert kinds.pop("torch-pruning") == {"=="}
    assert {name: kind for name, kind in kinds.items() if kind != {">="}} == {}
