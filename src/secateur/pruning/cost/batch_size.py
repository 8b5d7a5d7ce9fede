"""The memory guard: the largest batch whose activations fit into free memory."""

from __future__ import annotations

from secateur.graph.activation_memory import peak_bytes, total_bytes
from secateur.graph.dependency import DependencyGraph
from secateur.runtime.memory import USABLE_FRACTION

LEAST_BATCH = 2


def batch_that_fits(
    dependencies: DependencyGraph, asked: int, free: int, *, with_gradients: bool
) -> int:
    """Return the largest batch size, at most `asked`, that a pass has memory for.

    `free` is in bytes (`runtime.memory.free_bytes`). A pass with gradients holds all activations; a
    pass without holds only those that are still needed.
    """
    image_bytes = total_bytes(dependencies) if with_gradients else peak_bytes(dependencies)({})
    fits = int(USABLE_FRACTION * free / max(image_bytes, 1.0))
    return max(LEAST_BATCH, min(asked, fits))
