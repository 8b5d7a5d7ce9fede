"""secateur makes a trained convolutional network smaller and faster by what its filters see."""

from secateur.api import PruneResult, prune
from secateur.config import Budget, RunConfig
from secateur.data import DataSet
from secateur.data import load as load_data
from secateur.errors import SecateurError
from secateur.evaluation.evaluate import Score, evaluate
from secateur.experiments.run import run
from secateur.experiments.run_folder import load, load_program, save
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.integrations.onnx import ExportResult, export_onnx
from secateur.models.zoo import load as load_model
from secateur.pipeline.result import RunResult
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.version import __version__ as __version__

__all__ = [
    "Budget",
    "DataSet",
    "DependencyGraph",
    "ExportResult",
    "PruneResult",
    "PruningPlan",
    "RunConfig",
    "RunResult",
    "Score",
    "SecateurError",
    "apply_plan",
    "build_dependency_graph",
    "evaluate",
    "export_onnx",
    "load",
    "load_data",
    "load_model",
    "load_program",
    "make_plan",
    "prune",
    "run",
    "save",
]
