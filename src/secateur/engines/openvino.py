"""OpenVINO on the CPU as an engine. Needs the extra `openvino`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.config import EngineName
from secateur.engines.engine import Action, Program
from secateur.engines.file_engine import LAYER_RUNS, Array, FileEngine, arrays_of
from secateur.engines.onnx_file import cause
from secateur.runtime.errors import ExportError, UsageError

OTHER_OPERATIONS = ("Reorder", "Parameter", "Input", "Result", "Output", "Constant", "Const")
"""Operations that are not a layer's own."""


class OpenVino(FileEngine):
    """Runs ONNX files in OpenVINO, in float32 on every processor."""

    name: EngineName = "openvino"

    def __init__(self) -> None:
        super().__init__()
        try:
            import openvino
        except ImportError as error:
            raise UsageError(
                "OpenVINO needs the extra: pip install 'secateur[openvino]' "
                f"(no module {error.name})"
            ) from error
        # Behind the version come the number and the branch of the build.
        self.version: str = str(openvino.__version__).partition("-")[0]

    def load_file(self, path: Path, inputs: Sequence[Tensor]) -> Action:
        """Return what runs a file on inputs; see `FileEngine`."""
        request, arrays = openvino_request(path), arrays_of(inputs)
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)

    def file_seconds(self, content: bytes, images: Array) -> float:
        """Return the shortest time of a file's operations, as OpenVINO's profile gives it."""
        request = openvino_request(content, is_profiled=True)
        runs = []
        for _ in range(LAYER_RUNS):
            request.infer([images])
            runs.append(
                sum(
                    float(entry.real_time.total_seconds())
                    for entry in request.profiling_info
                    if not entry.node_type.startswith(OTHER_OPERATIONS)
                )
            )
        return min(runs[1:])


def load_openvino(path: Path) -> Program:
    """Return what runs a file; raises as `openvino_request` does."""
    request = openvino_request(path)

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        results = request.infer(arrays_of(inputs))
        return [torch.from_numpy(results[output]) for output in request.model_outputs]

    return run


def openvino_request(source: Path | bytes, *, is_profiled: bool = False) -> Any:
    """Return what runs a file, or the content of an ONNX file, on as many threads as PyTorch has.

    Raises `ExportError` if it can't be loaded, and `ImportError` without OpenVINO.
    """
    import openvino

    settings = {
        # Otherwise a processor with bfloat16 computes in it, and errs in the second digit.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # A pinned thread may share its core with another program, and then takes many times as
        # long.
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": is_profiled,
    }
    core = openvino.Core()
    try:
        model = core.read_model(source)
        return core.compile_model(model, "CPU", settings).create_infer_request()
    except RuntimeError as error:
        raise ExportError(f"OpenVINO can't load the network: {cause(error)}") from error
