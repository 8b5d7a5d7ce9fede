"""Operations of layers on tensors of any width, ready to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from secateur.graph.channel_ids import Axes, Ids, Layer
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import with_sizes
from secateur.runtime.timing import LATENCY_BATCH

Key = Hashable
Job = Callable[[], Callable[[], object]]
"""Returns the function that is timed."""
Jobs = dict[Key, Job]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A layer's operation on tensors of some shapes."""

    node: Node
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors that it reads, in their order."""
    sizes: Mapping[int, Any]
    """Other arguments that differ from the graph's."""

    @property
    def key(self) -> Key:
        """Equal for calls that take equally long: operation, shapes and other arguments."""
        args, kwargs = with_sizes(self.node, self.sizes)
        others = map_arg((tuple(args), kwargs), lambda node: str(node.meta["val"].dtype))
        return str(self.node.target), self.shapes, str(others)

    def job(self, tensors: Sequence[Tensor]) -> Job:
        """Return what prepares the call: as in a network, its first input was just written."""
        args, kwargs = with_sizes(self.node, self.sizes)
        first, *others = self.node.all_input_nodes
        operation = self.node.target
        assert callable(operation)

        def prepare() -> Callable[[], object]:
            inputs = {first: tensors[0].clone(), **dict(zip(others, tensors[1:], strict=True))}
            call_args, call_kwargs = map_arg((tuple(args), kwargs), inputs.__getitem__)
            return lambda: operation(*call_args, **call_kwargs)

        return prepare


def layer_call(dependencies: DependencyGraph, layer: Layer, removed: Ids) -> LayerCall:
    """Return a layer's operation in a network without some channels."""
    kept = np.ones(len(dependencies.channel_of), dtype=bool)
    kept[removed] = False
    count = dependencies.count_kept(kept)
    images = dependencies.graph.images

    def shape(node: Node) -> tuple[int, ...]:
        axes: Axes = dependencies.axes[node]
        sizes = (count(ids, int(n)) for ids, n in zip(axes, node.meta["val"].shape, strict=True))
        return tuple(n // images * LATENCY_BATCH if n and n % images == 0 else n for n in sizes)

    resize = dependencies.resizes.get(layer.node)
    shapes = tuple(shape(node) for node in layer.node.all_input_nodes)
    return LayerCall(layer.node, shapes, {} if resize is None else resize(count))


def jobs_of(calls: Mapping[Key, LayerCall]) -> Jobs:
    """Return jobs that run the calls, all on the same memory, since values don't matter."""
    memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    most = max((sum(map(math.prod, call.shapes)) for call in calls.values()), default=0)

    def tensors(call: LayerCall) -> Iterable[Tensor]:
        start = 0
        for node, shape in zip(call.node.all_input_nodes, call.shapes, strict=True):
            value = node.meta["val"]
            key = (value.dtype, value.device)
            if key not in memory:
                memory[key] = torch.randn(most, device=value.device).to(value.dtype)
            end = start + math.prod(shape)
            yield memory[key][start:end].view(shape)
            start = end

    return {key: call.job(list(tensors(call))) for key, call in calls.items()}
