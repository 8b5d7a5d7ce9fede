"""secateur makes a trained convolutional network smaller and faster by what its filters see."""

from secateur.api import PruneResult, prune
from secateur.bundle import load, load_program, save
from secateur.config import RunConfig
from secateur.data import DataSet
from secateur.data import load as load_data
from secateur.errors import SecateurError
from secateur.evaluate import Score, evaluate
from secateur.export import ExportResult, export_onnx
from secateur.models import load as load_model
from secateur.plan import PruningPlan, Target, make_plan
from secateur.reading import make_wiring
from secateur.result import RunResult
from secateur.runs import run
from secateur.surgery import apply_plan
from secateur.wiring import Wiring

__version__ = "0.1.0"

__all__ = [
    "DataSet",
    "ExportResult",
    "PruneResult",
    "PruningPlan",
    "RunConfig",
    "RunResult",
    "Score",
    "SecateurError",
    "Target",
    "Wiring",
    "apply_plan",
    "evaluate",
    "export_onnx",
    "load",
    "load_data",
    "load_model",
    "load_program",
    "make_plan",
    "make_wiring",
    "prune",
    "run",
    "save",
]
