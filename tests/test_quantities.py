"""Every quantity, computed fast and slowly: counted, or measured as the cut network runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import NETWORKS, random_images, random_plan, wired
from secateur.graph.build import build_dependency_graph
from secateur.graph.cut import cut
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import apply
from secateur.graph.module_state import tensors_of
from secateur.graph.network_graph import NetworkGraph
from secateur.graph.tensor_sizes import TensorSizes
from secateur.graph.trace import trace
from secateur.pruning.cost.quantities import count_quantity
from secateur.runtime.errors import UsageError


def live_bytes(graph: NetworkGraph, state: dict[str, Tensor], image: Tensor) -> int:
    """Most bytes of memory behind the values that are still needed, operation by operation."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    values: dict[Any, Any] = {graph.image: image}
    values |= {node: state[name] for node, name in graph.tensor_names.items()}
    values |= graph.constants
    storages = {
        tensor.untyped_storage().data_ptr() for n, tensor in values.items() if n != graph.image
    }
    most = 0
    for now, node in enumerate(graph.nodes):
        if node.op == "call_function":
            values[node] = apply(node, values.__getitem__, {})
        for other in list(values):
            last = position[graph.last_use.get(other, other)]
            if last < now and other not in graph.outputs:
                del values[other]
        memory = {}
        for value in values.values():
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, Tensor):
                    memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        most = max(most, sum(size for place, size in memory.items() if place not in storages))
    return most


class Views(nn.Module):
    """Halves of a value, one of them unused for long, a dropout, a copy, an operation with two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv1(x).chunk(2, 1)
        largest, _ = F.max_pool2d(self.conv2(left), 2, return_indices=True)
        largest = F.dropout(largest, training=self.training)
        x = self.conv3(F.interpolate(largest, scale_factor=2))
        x = (x + right).transpose(2, 3).reshape(len(x), -1, 64)
        logits: Tensor = self.linear(x.mean(2))
        return logits


def network_and_graph(name: str) -> tuple[nn.Module, DependencyGraph]:
    if name != "views":
        return wired(name, True)
    model = Views().eval()
    return model, build_dependency_graph(model, random_images(2))


ALL = [*NETWORKS, "views"]


@pytest.mark.parametrize("name", ALL)
def test_macs_and_parameters_are_those_that_the_dependency_graph_counts(
    name: str, generator: torch.Generator
) -> None:
    dependencies = network_and_graph(name)[1]
    macs, params = count_quantity(dependencies, "macs"), count_quantity(dependencies, "params")
    for removed in ({}, *(random_plan(dependencies, generator).removed for _ in range(5))):
        assert macs(removed) == dependencies.macs(removed)
        assert params(removed) == dependencies.params(removed)


@pytest.mark.parametrize("name", ALL)
def test_memory_equals_the_live_tensors_of_the_running_cut_network(
    name: str, generator: torch.Generator
) -> None:
    model, dependencies = network_and_graph(name)
    memory, image = count_quantity(dependencies, "memory"), random_images(1)
    for removed in ({}, *(random_plan(dependencies, generator).removed for _ in range(3))):
        smaller = cut(model, dependencies, removed).eval()
        graph = trace(smaller, random_images(2))
        assert memory(removed) == live_bytes(graph, tensors_of(smaller), image)


def test_memory_of_a_chain() -> None:
    dependencies = wired("chain")[1]
    memory = count_quantity(dependencies, "memory")
    assert memory({}) == 4 * (6 + 6) * 8 * 8  # what the first norm reads and writes
    assert memory({"conv1": (0, 3, 5)}) == 4 * (3 + 3) * 8 * 8
    assert memory({"conv1": (0, 1, 2, 3, 4)}) == 4 * (3 + 1) * 8 * 8  # the image, and one filter


def test_filters_are_counted_where_they_can_go() -> None:
    dependencies = wired("chain")[1]
    assert count_quantity(dependencies, "filters")({}) == 13
    assert count_quantity(dependencies, "filters")({"conv1": (1, 2)}) == 11


def test_tensor_sizes_count_repeated_and_fixed_channels() -> None:
    dependencies = wired("chain")[1]
    first = dependencies.groups["conv1"].channels[:2]
    fixed = first * 0 - 1
    rows = [(), (5,), (first, 3), (first.repeat(3), first), (fixed,), (first[:1], fixed, first)]
    sizes = TensorSizes(dependencies.groups, rows)
    assert sizes({}).tolist() == [1, 5, 6, 12, 2, 4]
    assert sizes({"conv1": (1,)}).tolist() == [1, 5, 3, 3, 2, 2]
    assert TensorSizes(dependencies.groups, [])({}).tolist() == []


@pytest.mark.parametrize("name", ["residual", "concat", "flattened", "grouped"])
def test_sizes_do_not_depend_on_the_cuts_before(name: str, generator: torch.Generator) -> None:
    """What one cut changes is counted from the one before: also after a caller changed a list."""
    _, dependencies = wired(name, True)
    rows = [
        tuple(slots.channels for slots in dependencies.slots if slots.tensor == tensor)
        for tensor in dependencies.shapes
    ]
    used = TensorSizes(dependencies.groups, rows)
    for _ in range(8):
        plan = {
            group: tuple(torch.randperm(len(g), generator=generator)[: len(g) // 2].tolist())
            for group, g in dependencies.groups.items()
        }
        changing = {group: list(numbers) for group, numbers in plan.items()}
        for removed in (plan, {}, changing, changing):
            fresh = TensorSizes(dependencies.groups, rows)
            assert used(removed).tolist() == fresh(removed).tolist()
            for numbers in changing.values():
                del numbers[1:]


def test_latency_needs_a_table() -> None:
    with pytest.raises(UsageError, match="needs times of the network's layers: pass latency="):
        count_quantity(wired("chain")[1], "latency")
