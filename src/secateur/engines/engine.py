"""What every engine does: run a network, and time its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from secateur.config import EngineName
from secateur.graph.layer_calls import Key, LayerCall

Action = Callable[[], object]
Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Returns the outputs of a file for inputs in the network's order."""


class Engine(Protocol):
    """Runs networks on this machine, on as many threads as PyTorch has."""

    name: EngineName
    version: str
    grid: int
    """Layers are timed at multiples of this many channels: others may be much slower."""

    def prepare(self, model: nn.Module, batch: Tensor) -> Action:
        """Return what runs a network, as it is now in evaluation mode, on a batch.

        Raises `ExportError` if the engine can't run the network, and `UsageError` if something that
        the engine needs is missing here.
        """

    def layer_seconds(self, calls: Mapping[Key, LayerCall]) -> dict[Key, float]:
        """Return the seconds that layers take on their own, of those that the engine can time."""
