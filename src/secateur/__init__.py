"""secateur prunes trained convolutional networks by what their filters respond to."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur.runtime.version import __version__ as __version__

if TYPE_CHECKING:
    from secateur.api import PruneResult, estimate, evaluate, prune
    from secateur.config import Budget, RunConfig
    from secateur.data import DataSet
    from secateur.data import load as load_data
    from secateur.experiments.onnx_export import ExportResult, export_onnx
    from secateur.experiments.push import push
    from secateur.experiments.run import run
    from secateur.experiments.run_folder import load, load_program, save
    from secateur.graph.build import build_dependency_graph
    from secateur.graph.dependency import DependencyGraph
    from secateur.graph.output_values import OutputPart
    from secateur.models.score import Score
    from secateur.models.zoo import load as load_model
    from secateur.pipeline.estimate import Estimate
    from secateur.pipeline.result import RunResult
    from secateur.pruning.apply import apply_plan
    from secateur.pruning.plan import PruningPlan, make_plan
    from secateur.runtime.errors import SecateurError

__all__ = [
    "Budget",
    "DataSet",
    "DependencyGraph",
    "Estimate",
    "ExportResult",
    "OutputPart",
    "PruneResult",
    "PruningPlan",
    "RunConfig",
    "RunResult",
    "Score",
    "SecateurError",
    "apply_plan",
    "build_dependency_graph",
    "estimate",
    "evaluate",
    "export_onnx",
    "load",
    "load_data",
    "load_model",
    "load_program",
    "make_plan",
    "prune",
    "push",
    "run",
    "save",
]

_PLACES = {
    "Budget": "config",
    "DataSet": "data",
    "DependencyGraph": "graph.dependency",
    "Estimate": "pipeline.estimate",
    "ExportResult": "experiments.onnx_export",
    "OutputPart": "graph.output_values",
    "PruneResult": "api",
    "PruningPlan": "pruning.plan",
    "RunConfig": "config",
    "RunResult": "pipeline.result",
    "Score": "models.score",
    "SecateurError": "runtime.errors",
    "apply_plan": "pruning.apply",
    "build_dependency_graph": "graph.build",
    "estimate": "api",
    "evaluate": "api",
    "export_onnx": "experiments.onnx_export",
    "load": "experiments.run_folder",
    "load_data": "data:load",
    "load_model": "models.zoo:load",
    "load_program": "experiments.run_folder",
    "make_plan": "pruning.plan",
    "prune": "api",
    "push": "experiments.push",
    "run": "experiments.run",
    "save": "experiments.run_folder",
}
"""Module of each public name, and what it is called there if that differs."""


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: `import secateur` alone imports no torch."""
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    module, _, original = place.partition(":")
    value = getattr(importlib.import_module(f"secateur.{module}"), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
