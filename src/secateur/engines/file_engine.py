"""What engines have in common that run ONNX files."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.config import EngineName
from secateur.engines.engine import Action
from secateur.engines.flat_network import inputs_in
from secateur.engines.layer_file import layer_file
from secateur.engines.onnx_file import check_packages, write_onnx
from secateur.graph.layer_calls import Key, LayerCall
from secateur.runtime.timing import in_turn

LAYER_RUNS = 7
"""Runs of a layer on its own, the first of which doesn't count; the shortest does."""

Array = npt.NDArray[np.float32]


class FileEngine(ABC):
    """An engine that runs ONNX files; raises `UsageError` if the extra is not installed."""

    name: EngineName
    version: str
    grid: int = 1

    def __init__(self) -> None:
        check_packages()

    def prepare(self, model: nn.Module, batch: Tensor) -> Action:
        """Return what runs a network on a batch; see `Engine`."""
        inputs = inputs_in(model, batch)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            write_onnx(model, batch, path, [f"input_{number}" for number in range(len(inputs))])
            return self.prepare_file(path, inputs)

    def prepare_file(self, path: Path, inputs: Sequence[Tensor]) -> Action:
        """Return what runs a file, once read, on inputs in the file's order.

        It is loaded more than once, and the copies run in turn. Raises `ExportError` if the engine
        can't load it.
        """
        return in_turn(lambda: self.load_file(path, inputs))

    @abstractmethod
    def load_file(self, path: Path, inputs: Sequence[Tensor]) -> Action:
        """Return what runs one copy of a file; raises as `prepare_file` does."""

    def layer_seconds(self, calls: Mapping[Key, LayerCall]) -> dict[Key, float]:
        """Return the seconds of layers, without bringing values into the layout that they read."""
        generator = np.random.default_rng(0)
        seconds = {}
        for key, call in calls.items():
            content = layer_file(call)
            if content is not None:
                images = generator.standard_normal(call.shapes[0], dtype=np.float32)
                seconds[key] = self.file_seconds(content, images)
        return seconds

    @abstractmethod
    def file_seconds(self, content: bytes, images: Array) -> float:
        """Return the shortest time of a file's operations without those that change the layout."""


def arrays_of(inputs: Sequence[Tensor]) -> list[npt.NDArray[np.generic]]:
    """Return inputs as arrays."""
    with torch.no_grad():
        return [tensor.cpu().numpy() for tensor in inputs]
