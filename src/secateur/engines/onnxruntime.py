"""onnxruntime on the CPU as an engine. Needs the extra `export`."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.config import EngineName
from secateur.engines.engine import Action, Program
from secateur.engines.file_engine import LAYER_RUNS, Array, FileEngine, arrays_of
from secateur.engines.onnx_file import cause
from secateur.runtime.errors import ExportError


class OnnxRuntime(FileEngine):
    """Runs ONNX files in onnxruntime."""

    name: EngineName = "onnxruntime"
    grid: int = 4
    """Convolutions keep the blocked layout where the channels that they read are a multiple of 4
    (`plan.GRIDS`)."""

    def __init__(self) -> None:
        super().__init__()
        import onnxruntime

        self.version: str = onnxruntime.__version__

    def load_file(self, path: Path, inputs: Sequence[Tensor]) -> Action:
        """Return what runs a file on inputs; see `FileEngine`."""
        run = onnx_runner(path)
        return lambda: run(*inputs)

    def file_seconds(self, content: bytes, images: Array) -> float:
        """Return the shortest time of a file's kernels, as onnxruntime's profile gives it."""
        with tempfile.TemporaryDirectory() as folder:
            session = _session(content, "a layer", Path(folder) / "layer")
            for _ in range(LAYER_RUNS):
                session.run(None, {"x": images})
            events = json.loads(Path(session.end_profiling()).read_text())
        runs: dict[str, list[float]] = defaultdict(list)
        for event in events:
            operation = event.get("args", {}).get("op_name", "")
            if event["name"].endswith("_kernel_time") and not operation.startswith("Reorder"):
                runs[event["name"]].append(1e-6 * event["dur"])
        return sum(min(times[1:]) for times in runs.values())


def onnx_runner(path: Path) -> Callable[..., list[Any]]:
    """Return a function that runs the file in onnxruntime, on as many CPU threads as PyTorch has.

    It takes the inputs in the file's order, and returns the outputs as NumPy arrays. Raises
    `ExportError` if the file can't be loaded.
    """
    session = _session(str(path), str(path))
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Any]:
        outputs: list[Any] = session.run(None, dict(zip(names, arrays_of(inputs), strict=True)))
        return outputs

    return run


def load_onnx(path: Path) -> Program:
    """Return what `onnx_runner` does, from tensors to tensors."""
    run = onnx_runner(path)
    return lambda inputs: [torch.from_numpy(array) for array in run(*inputs)]


def input_names(path: Path) -> list[str]:
    """Return the names of a file's inputs, in their order; raises as `onnx_runner` does."""
    return [value.name for value in _session(str(path), str(path)).get_inputs()]


def _session(file: str | bytes, name: str, profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads wait for work by spinning, without this even after a run has ended: they would slow
    # the network that is timed next, up to four times.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no root for its exceptions
        raise ExportError(f"onnxruntime can't load {name}: {cause(error)}") from error
