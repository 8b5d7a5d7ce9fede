"""The packages that metrics need beside torch, from the extra `metrics`."""

from __future__ import annotations

import importlib
from types import ModuleType

from secateur.runtime.errors import UsageError


def require(module: str, metric: str) -> ModuleType:
    """Import a module that a metric needs; raise `UsageError` that names the extra without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"{metric} needs {package}, which is not installed: pip install 'secateur[metrics]'"
        ) from error
