"""The engines by their names."""

from __future__ import annotations

from secateur.config import EngineName
from secateur.engines.engine import Engine
from secateur.engines.pytorch import Compiled, PyTorch


def find_engine(name: EngineName) -> Engine:
    """Return an engine by its name; raises `UsageError` if its package is not installed."""
    if name == "onnxruntime":
        from secateur.engines.onnxruntime import OnnxRuntime

        return OnnxRuntime()
    if name == "openvino":
        from secateur.engines.openvino import OpenVino

        return OpenVino()
    if name == "executorch":
        from secateur.engines.executorch import ExecuTorch

        return ExecuTorch()
    return Compiled() if name == "compile" else PyTorch()
