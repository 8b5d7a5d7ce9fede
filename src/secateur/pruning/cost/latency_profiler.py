"""Time a network's layers on this machine, so that `latency_model` can predict cut networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.fx.node import Node, map_arg

from secateur.graph.channel_ids import Axes, Ids, Layer
from secateur.graph.cut import cut
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed
from secateur.graph.interpreter import with_sizes
from secateur.pruning.allocation import SearchSpace, equal_fractions
from secateur.pruning.cost.latency_model import (
    SMALL,
    Hardware,
    Interpolation,
    LatencyTable,
    LayerTimes,
    LayerWidths,
    Numbers,
    is_prunable,
    layers_ms,
    widths_of,
)
from secateur.pruning.cost.memory import count_other_values
from secateur.pruning.cost.tensor_sizes import Dimension
from secateur.pruning.ranking import rank
from secateur.runtime.environment import environment
from secateur.runtime.module_state import evaluating
from secateur.runtime.timing import (
    LATENCY_BATCH,
    Rounds,
    interleaved_medians,
    interleaved_seconds,
    repeat_to_batch,
)

BLOCKS = (1, 8, 16)
"""Numbers of channels that machines are known to compute at once."""
FRACTIONS = (0.85, 0.7, 0.55, 0.4)
"""Fractions of filters kept by the networks that are timed whole, besides the uncut one."""
TABLE_ROUNDS = Rounds(fewest=3, most=15, seconds=12.0)
"""Rounds in which a latency table is measured."""
INTERLEAVED_ROUNDS = Rounds(fewest=11, most=51, seconds=5.0, warm_up=1)
"""Forward passes of each of two networks that are compared."""

Key = Hashable
Job = Callable[[], Callable[[], object]]
"""Returns the function that is timed."""
Jobs = dict[Key, Job]
Times = Mapping[Key, float]


def measure_latency(
    model: nn.Module, dependencies: DependencyGraph, images: Tensor
) -> LatencyTable:
    """Return the times of `model` and of its layers on this machine, in evaluation mode.

    `images` `[image, rgb, height, width]` are repeated to a batch of `LATENCY_BATCH`. Every round
    times everything once, so that a machine that gets slower or faster favours nothing. The
    shortest time counts. Layers with the same operation and shapes are timed once.
    """
    samples = [
        _sample(dependencies, layer, widths)
        for layer, widths in zip(dependencies.layers, widths_of(dependencies), strict=True)
    ]
    batch = repeat_to_batch(images, LATENCY_BATCH)
    cuts = _uniform_cuts(dependencies)
    networks: Jobs = {
        number: _forward(cut(model, dependencies, removed).eval(), batch)
        for number, removed in enumerate(cuts)
    }
    calls = {call.key: call for sample in samples for call in sample.calls}
    times = _time(networks, _jobs(calls))
    layers = tuple(sample.times(times) for sample in samples)
    block = min(BLOCKS, key=lambda block: _error(samples, layers, times, block))
    alone, values = layers_ms(dependencies, layers, block), count_other_values(dependencies)
    whole = np.array([times[number] for number in range(len(cuts))])
    terms = np.array([[float(alone(removed).sum()), values(removed), 1.0] for removed in cuts])
    # Layers take at least as long in the network as alone. Without this bound a few noisy times
    # could give them no weight, since fewer channels also mean fewer values.
    extra, ms_per_value, fixed_ms = fit_non_negative(
        terms / whole[:, None], 1 - terms[:, 0] / whole
    )
    return LatencyTable(
        hardware=_hardware(batch),
        batch=LATENCY_BATCH,
        block=block,
        layers=layers,
        layers_factor=1 + extra,
        fixed_ms=fixed_ms,
        ms_per_value=ms_per_value,
    )


def measure_fraction_left(model: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """Return the latency of `smaller` over that of `model`: the ratio of medians, interleaved.

    `images` `[image, rgb, height, width]` are repeated to a batch of `LATENCY_BATCH`.
    """
    batch = repeat_to_batch(images, LATENCY_BATCH)
    passes = {"before": lambda: model(batch), "after": lambda: smaller(batch)}
    with evaluating(model), evaluating(smaller), torch.inference_mode():
        medians = interleaved_medians(passes, INTERLEAVED_ROUNDS)
    return medians["after"] / medians["before"]


def _hardware(batch: Tensor) -> Hardware:
    machine = environment()
    is_cuda = batch.device.type == "cuda"
    return Hardware(
        processor=machine.processor,
        threads=machine.threads,
        device=torch.cuda.get_device_name(batch.device) if is_cuda else str(batch.device),
        dtype=str(batch.dtype).removeprefix("torch."),
        torch=machine.torch,
    )


def _uniform_cuts(dependencies: DependencyGraph) -> list[Removed]:
    """Return cuts in which every group keeps the same fraction of its filters; first no cut."""
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    ranking = rank(scores, dependencies, "uniform")
    steps = {n: range(ranking.least[n], len(order) + 1) for n, order in ranking.order.items()}
    filters = sum(map(len, scores.values()))
    cuts: list[Removed] = [{}]
    for fraction in FRACTIONS:
        space = SearchSpace(steps, lambda counts: sum(counts.values()), fraction * filters)
        if space.fits(space.least):  # otherwise the network can't be cut that far
            removed = ranking.removed(equal_fractions(space))
            if removed not in cuts:
                cuts.append(removed)
    return cuts


def _forward(model: nn.Module, batch: Tensor) -> Job:
    return lambda: lambda: model(batch)


@dataclass(frozen=True, eq=False)
class _Call:
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


@dataclass(frozen=True, eq=False)
class _Sample:
    """The widths that a layer is timed at."""

    layer: str
    read: tuple[int, ...]
    produced: tuple[int, ...]
    grid: tuple[tuple[_Call, ...], ...]
    """`[read][produced]`."""
    checks: tuple[tuple[int, int, _Call], ...]
    """Widths read and produced between those of the grid, to choose the block by."""

    @property
    def calls(self) -> Iterable[_Call]:
        """All calls that are timed."""
        return itertools.chain(*self.grid, (call for *_, call in self.checks))

    def times(self, times: Times) -> LayerTimes:
        """Return the layer's times on the grid."""
        return LayerTimes(
            layer=self.layer,
            read=self.read,
            produced=self.produced,
            ms=tuple(tuple(times[call.key] for call in row) for row in self.grid),
        )


def _sample(dependencies: DependencyGraph, layer: Layer, widths: LayerWidths) -> _Sample:
    read, produced = _narrowed(widths.read, _grid), _narrowed(widths.produced, _grid)
    whole_read, whole_produced = max(read), max(produced)

    def call(*removed: Ids) -> _Call:
        return _call(dependencies, layer, np.concatenate(removed))

    check_read, check_produced = (
        _narrowed(dimension, _checks) for dimension in (widths.read, widths.produced)
    )
    checks = [
        *((width, whole_produced, call(removed)) for width, removed in check_read.items()),
        *((whole_read, width, call(removed)) for width, removed in check_produced.items()),
    ]
    return _Sample(
        layer.name,
        tuple(read),
        tuple(produced),
        tuple(tuple(call(row, column) for column in produced.values()) for row in read.values()),
        tuple(checks),
    )


def _narrowed(dimension: Dimension, widths: Callable[[int], Iterable[int]]) -> dict[int, Ids]:
    """Return `{width: channels to remove}`, rising, near the wanted widths of a dimension."""
    nothing = np.zeros(0, dtype=np.int64)
    if isinstance(dimension, int):
        return {dimension: nothing}
    if not is_prunable(dimension):
        return {len(dimension): nothing}
    channels = np.unique(dimension[dimension != NOT_PRUNABLE])
    fixed = int(np.count_nonzero(dimension == NOT_PRUNABLE))
    copies = (len(dimension) - fixed) / len(channels)
    removed: dict[int, Ids] = {}
    for width in widths(len(dimension)):
        count = min(max(1, math.ceil((width - fixed) / copies)), len(channels))
        kept = channels[np.arange(count) * len(channels) // count]
        left = fixed + int(np.isin(dimension, kept).sum())
        removed[left] = np.setdiff1d(channels, kept)
    return dict(sorted(removed.items()))


def _grid(size: int) -> set[int]:
    """Return the widths to time a dimension at.

    A narrow dimension is timed at every block and at both sides of the first one; a wide one at six
    widths. These are odd numbers of blocks, since round ones, such as 384, are faster than their
    neighbours.
    """
    if size <= 4 * SMALL:
        return {1, SMALL // 2, SMALL - 1, *range(SMALL, size, SMALL), size}
    fractions = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
    return {SMALL, *(SMALL * (math.ceil(part * size / SMALL) | 1) for part in fractions), size}


def _checks(size: int) -> set[int]:
    """Return widths just above whole blocks, where the size of a block matters most."""
    return {min(size, int(part * size) // SMALL * SMALL + 3) for part in (0.35, 0.6, 0.85)}


def _call(dependencies: DependencyGraph, layer: Layer, removed: Ids) -> _Call:
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
    return _Call(layer.node, shapes, {} if resize is None else resize(count))


def _jobs(calls: Mapping[Key, _Call]) -> Jobs:
    """Return jobs that run the calls, all on the same memory, since values don't matter."""
    memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    most = max((sum(map(math.prod, call.shapes)) for call in calls.values()), default=0)

    def tensors(call: _Call) -> Iterable[Tensor]:
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


def _time(networks: Jobs, layers: Jobs) -> Times:
    """Return the shortest time of every job in milliseconds; networks run three times per round.

    The shortest, since other work on the machine only adds time, and hits long jobs more often.
    """
    keys = list(layers)
    third = -(-len(keys) // 3)
    order = [
        key for start in (0, third, 2 * third) for key in (*networks, *keys[start : start + third])
    ]
    jobs = {**networks, **layers}

    def prepare(key: Key) -> Callable[[], object]:
        action = jobs[key]()
        action()  # so that the job before it does not influence the time
        return action

    with torch.inference_mode():
        times = interleaved_seconds(order, prepare, TABLE_ROUNDS)
    return {key: 1e3 * min(runs) for key, runs in times.items()}


def _error(
    samples: Sequence[_Sample], layers: Sequence[LayerTimes], times: Times, block: int
) -> float:
    """Return how far the checks are from the times predicted with a block, in milliseconds."""
    total = 0.0
    for sample, layer in zip(samples, layers, strict=True):
        interpolate = Interpolation([layer], block)
        for read, produced, call in sample.checks:
            expected = interpolate(np.array([read]), np.array([produced]))
            total += abs(float(expected[0]) - times[call.key])
    return total


def fit_non_negative(terms: Numbers, totals: Numbers) -> list[float]:
    """Return non-negative factors of the columns of `terms` that best add up to `totals`.

    `terms` is `[total, term]`. The fit is non-negative least squares; columns are scaled to unit
    norm first, since they differ by many orders of magnitude.
    """
    scales = np.linalg.norm(terms, axis=0)
    scales[scales == 0] = 1.0
    factors, _ = nnls(terms / scales, totals)
    return [float(factor) for factor in factors / scales]
