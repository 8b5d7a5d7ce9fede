"""PyTorch as an engine: operation by operation, or compiled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.config import EngineName
from secateur.engines.engine import Action
from secateur.graph.layer_calls import Key, LayerCall
from secateur.runtime.errors import UsageError
from secateur.runtime.torch_internals import recompiling

MOST_COMPILED = 64
"""Networks of one class that are compiled in a process; torch gives up on further ones after 8."""


class PyTorch:
    """Runs the operations of a network one after the other."""

    name: EngineName = "pytorch"
    version: str = str(torch.__version__)
    grid: int = 1

    def prepare(self, model: nn.Module, batch: Tensor) -> Action:
        """Return what runs a network on a batch; see `Engine`."""
        return lambda: model(batch)

    def layer_seconds(self, calls: Mapping[Key, LayerCall]) -> dict[Key, float]:
        """Return nothing: PyTorch's layers are timed interleaved with networks."""
        return {}


class Compiled(PyTorch):
    """Runs what `torch.compile` makes of a network. Its layers are timed as in PyTorch."""

    name: EngineName = "compile"

    def prepare(self, model: nn.Module, batch: Tensor) -> Action:
        """Return what runs a network on a batch; see `Engine`."""
        compiled = torch.compile(model, dynamic=False)
        try:
            with recompiling(MOST_COMPILED), torch.inference_mode():
                compiled(batch)
        except Exception as error:  # the compiler raises many unrelated types
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UsageError(
                f"torch.compile can't compile the network here: {line}; choose another --engine"
            ) from error
        return lambda: compiled(batch)
