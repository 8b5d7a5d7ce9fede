"""Times a network's layers on this machine, so that the latency of cut ones can be predicted."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node, map_arg

from secateur.config import Budget
from secateur.errors import TargetError
from secateur.evaluation.timing import LATENCY_BATCH, repeat_to_batch, seconds
from secateur.graph.channel_ids import Axes, Ids, Layer
from secateur.graph.cut import cut
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed
from secateur.graph.interpreter import with_sizes
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
    other_values,
    widths_of,
)
from secateur.pruning.cost.tensor_sizes import Dimension
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.runtime.environment import environment
from secateur.runtime.module_state import evaluating

BLOCKS = (1, 8, 16)
"""Numbers of channels that machines are known to compute at once."""
FRACTIONS = (0.85, 0.7, 0.55, 0.4)
"""Filters that a network keeps where it is timed as a whole, besides the uncut one."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
BUDGET_SECONDS = 12.0
"""After so long no further round is begun, once the least number is done."""
ROUNDS = (11, 51)
"""Forward passes of each of two networks that are compared: at least, and at most…"""
ROUNDS_SECONDS = 5.0
"""…between which no further one is begun after so long."""
PLANS = 6
"""Plans that are made and timed to reach a target of latency…"""
NEAR = 0.02
"""…unless one is below it by less than twice this share; once is what is aimed at."""

Key = Hashable
Job = Callable[[], Callable[[], object]]
"""Gives the function that is timed."""
Jobs = dict[Key, Job]
Times = Mapping[Key, float]


def measure_latency(
    model: nn.Module, dependencies: DependencyGraph, images: Tensor
) -> LatencyTable:
    """The times of `model` and of its layers on this machine, in evaluation mode.

    `images` `[image, rgb, height, width]` are repeated to a batch of `LATENCY_BATCH`. Everything is
    timed once in every round, so that a machine that grows slower or faster favours nothing; the
    least time counts. What several layers have in common is timed once.
    """
    samples = [
        _sample(dependencies, layer, widths)
        for layer, widths in zip(dependencies.layers, widths_of(dependencies), strict=True)
    ]
    batch = repeat_to_batch(images, LATENCY_BATCH)
    removed = _uniform_cuts(dependencies)
    networks: Jobs = {
        number: _forward(cut(model, dependencies, each).eval(), batch)
        for number, each in enumerate(removed)
    }
    calls = {call.key: call for each in samples for call in each.calls}
    times = _time(networks, _jobs(calls))
    layers = tuple(each.times(times) for each in samples)
    block = min(BLOCKS, key=lambda block: _error(samples, layers, times, block))
    alone, values = layers_ms(dependencies, layers, block), other_values(dependencies)
    whole = np.array([times[number] for number in range(len(removed))])
    terms = np.array([[float(alone(each).sum()), values(each), 1.0] for each in removed])
    # Layers take at least as long in the network as alone: else a few noisy times could say that
    # they don't count, since fewer channels are fewer values, too.
    more, slope, fixed = combination(terms / whole[:, None], 1 - terms[:, 0] / whole)
    return LatencyTable(
        hardware=_hardware(batch),
        batch=LATENCY_BATCH,
        block=block,
        layers=layers,
        layers_factor=1 + more,
        fixed_ms=fixed,
        ms_per_value=slope,
    )


def plan_in_time(
    model: nn.Module,
    dependencies: DependencyGraph,
    plan: Callable[[float], PruningPlan],
    fraction_left: float,
    least: float,
    images: Tensor,
) -> tuple[PruningPlan, float]:
    """A plan whose network takes a fraction of the time of `model`, and the fraction as measured.

    `plan(fraction)` gives the plan that is predicted to take a fraction, `least` or more. What is
    predicted is some per cent off, so the network is cut and timed beside the whole one,
    interleaved, and the plan made anew for a smaller or larger fraction. Taken is the plan that
    takes the most time of those within the fraction. Raises `TargetError` where none is within it.
    """
    aim = max(fraction_left, least)
    best: tuple[PruningPlan, float] | None = None
    points = [(1.0, 1.0)]  # what was predicted, and what was measured
    for _ in range(PLANS):
        made = plan(aim)
        found = measure_fraction_left(model, cut(model, dependencies, made.removed), images)
        points.append((aim, found))
        if found <= fraction_left and (best is None or found > best[1]):
            best = made, found
        earlier, aim = aim, max(_next_aim(points, (1 - NEAR) * fraction_left), least)
        if (1 - 2 * NEAR) * fraction_left <= found <= fraction_left or aim == earlier:
            break
    if best is None:
        fastest = min(found for _, found in points)
        raise TargetError(
            f"target latency={fraction_left:g} is out of reach: {fastest:.3f} of the time stay, as "
            "measured, in the fastest network that was found"
        )
    return best


def _next_aim(points: Sequence[tuple[float, float]], fraction_left: float) -> float:
    """What to predicts so that a fraction is measured: on the line between the nearest points.

    Where all that was measured is above the fraction, as much below the lowest as that is above.
    """
    aim, found = min((p for p in points if p[1] > fraction_left), key=lambda point: point[1])
    below = max((p for p in points if p[1] <= fraction_left), key=lambda p: p[1], default=None)
    if below is None:
        return aim * fraction_left / found
    share = (fraction_left - below[1]) / (found - below[1])
    return below[0] + share * (aim - below[0])


def measure_fraction_left(model: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """The time of a forward pass of `smaller` over that of `model`, by the medians of turns.

    `images` `[image, rgb, height, width]` are repeated to a batch of `LATENCY_BATCH`.
    """
    batch = repeat_to_batch(images, LATENCY_BATCH)
    times: dict[str, list[float]] = {"before": [], "after": []}
    fewest, most = ROUNDS
    begun = time.perf_counter()
    with evaluating(model), evaluating(smaller), torch.inference_mode():
        for turn in range(most + 1):
            if turn > fewest and time.perf_counter() - begun > ROUNDS_SECONDS:
                break
            for name, network in (("before", model), ("after", smaller)):
                taken = seconds(functools.partial(network, batch))
                if turn:  # the first turn warms up
                    times[name].append(taken)
    return statistics.median(times["after"]) / statistics.median(times["before"])


def _hardware(batch: Tensor) -> Hardware:
    here = environment()
    is_cuda = batch.device.type == "cuda"
    return Hardware(
        processor=here.processor,
        threads=here.threads,
        device=torch.cuda.get_device_name(batch.device) if is_cuda else str(batch.device),
        dtype=str(batch.dtype).removeprefix("torch."),
        torch=here.torch,
    )


def _uniform_cuts(dependencies: DependencyGraph) -> list[Removed]:
    """What goes where every group keeps the same share of its filters; first nothing."""
    result: list[Removed] = [{}]
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    for fraction in FRACTIONS:
        with contextlib.suppress(TargetError):  # the network can't be cut so far
            plan = make_plan(scores, dependencies, Budget("filters", fraction), "uniform")
            if plan.removed not in result:
                result.append(plan.removed)
    return result


def _forward(model: nn.Module, batch: Tensor) -> Job:
    return lambda: lambda: model(batch)


@dataclass(frozen=True, eq=False)
class _Call:
    """A layer's operation on tensors of some shapes."""

    node: Node
    shapes: tuple[tuple[int, ...], ...]
    """Of the values that it reads, in their order."""
    sizes: Mapping[int, Any]
    """Other arguments that differ from the graph's."""

    @property
    def key(self) -> Key:
        """What calls that take equally long have in common."""
        args, kwargs = with_sizes(self.node, self.sizes)
        others = map_arg((tuple(args), kwargs), lambda node: str(node.meta["val"].dtype))
        return str(self.node.target), self.shapes, str(others)

    def job(self, tensors: Sequence[Tensor]) -> Job:
        """What prepares it: as in a network, its first input has just been written."""
        args, kwargs = with_sizes(self.node, self.sizes)
        first, *others = self.node.all_input_nodes
        operation = self.node.target
        assert callable(operation)

        def prepare() -> Callable[[], object]:
            given = {first: tensors[0].clone(), **dict(zip(others, tensors[1:], strict=True))}
            args_given, kwargs_given = map_arg((tuple(args), kwargs), given.__getitem__)
            return lambda: operation(*args_given, **kwargs_given)

        return prepare


@dataclass(frozen=True, eq=False)
class _Sample:
    """The widths that a layer is timed at."""

    layer: str
    read: tuple[int, ...]
    written: tuple[int, ...]
    grid: tuple[tuple[_Call, ...], ...]
    """`[read][written]`."""
    checks: tuple[tuple[int, int, _Call], ...]
    """Widths read and written between those of the grid, to choose the block by."""

    @property
    def calls(self) -> Iterable[_Call]:
        """All that is timed."""
        return itertools.chain(*self.grid, (call for *_, call in self.checks))

    def times(self, times: Times) -> LayerTimes:
        """The layer's times on the grid."""
        return LayerTimes(
            layer=self.layer,
            read=self.read,
            produced=self.written,
            ms=tuple(tuple(times[call.key] for call in row) for row in self.grid),
        )


def _sample(dependencies: DependencyGraph, layer: Layer, widths: LayerWidths) -> _Sample:
    read, written = _narrowed(widths.read, _grid), _narrowed(widths.produced, _grid)
    whole_read, whole_written = max(read), max(written)

    def call(*gone: Ids) -> _Call:
        return _call(dependencies, layer, np.concatenate(gone))

    checks = [
        *((w, whole_written, call(gone)) for w, gone in _narrowed(widths.read, _checks).items()),
        *((whole_read, w, call(gone)) for w, gone in _narrowed(widths.produced, _checks).items()),
    ]
    return _Sample(
        layer.name,
        tuple(read),
        tuple(written),
        tuple(tuple(call(gone, too) for too in written.values()) for gone in read.values()),
        tuple(checks),
    )


def _narrowed(dimension: Dimension, widths: Callable[[int], Iterable[int]]) -> dict[int, Ids]:
    """`{width: channels that go}` for about the wanted widths of a dimension, rising."""
    nothing = np.zeros(0, dtype=np.int64)
    if isinstance(dimension, int):
        return {dimension: nothing}
    if not is_prunable(dimension):
        return {len(dimension): nothing}
    channels = np.unique(dimension[dimension != NOT_PRUNABLE])
    held = int(np.count_nonzero(dimension == NOT_PRUNABLE))
    indices_each = (len(dimension) - held) / len(channels)
    found: dict[int, Ids] = {}
    for width in widths(len(dimension)):
        count = min(max(1, math.ceil((width - held) / indices_each)), len(channels))
        kept = channels[np.arange(count) * len(channels) // count]
        left = held + int(np.isin(dimension, kept).sum())
        found[left] = np.setdiff1d(channels, kept)
    return dict(sorted(found.items()))


def _grid(size: int) -> set[int]:
    """Every block of a narrow dimension, and both sides of its first; six widths of a wide one.

    Those are odd numbers of blocks: round ones, such as 384, are faster than what is about them.
    """
    if size <= 4 * SMALL:
        return {1, SMALL // 2, SMALL - 1, *range(SMALL, size, SMALL), size}
    shares = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
    return {SMALL, *(SMALL * (math.ceil(share * size / SMALL) | 1) for share in shares), size}


def _checks(size: int) -> set[int]:
    """Widths just above whole blocks, where the size of the blocks tells most."""
    return {min(size, int(share * size) // SMALL * SMALL + 3) for share in (0.35, 0.6, 0.85)}


def _call(dependencies: DependencyGraph, layer: Layer, gone: Ids) -> _Call:
    """A layer's operation in a network without some channels."""
    kept = np.ones(len(dependencies.channel_of), dtype=bool)
    kept[gone] = False

    def count(ids: Ids | None, size: int) -> int:
        if ids is None:
            return size
        channels = dependencies.channel_of[ids]
        return int(np.count_nonzero((channels == NOT_PRUNABLE) | kept[channels]))

    images = dependencies.graph.images

    def shape(node: Node) -> tuple[int, ...]:
        axes: Axes = dependencies.axes[node]
        sizes = (count(ids, int(n)) for ids, n in zip(axes, node.meta["val"].shape, strict=True))
        return tuple(n // images * LATENCY_BATCH if n and n % images == 0 else n for n in sizes)

    resize = dependencies.resizes.get(layer.node)
    shapes = tuple(shape(node) for node in layer.node.all_input_nodes)
    return _Call(layer.node, shapes, {} if resize is None else resize(count))


def _jobs(calls: Mapping[Key, _Call]) -> Jobs:
    """What carries the calls out, all on the same memory: what it holds does not matter."""
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
    """The least time of every job in milliseconds; networks are timed thrice a round.

    The least, since whatever else the machine does only adds, and adds more often to what is long.
    """
    keys = list(layers)
    third = -(-len(keys) // 3)
    order = [
        key for start in (0, third, 2 * third) for key in (*networks, *keys[start : start + third])
    ]
    jobs = {**networks, **layers}
    found: dict[Key, list[float]] = {key: [] for key in jobs}
    with torch.inference_mode():
        begun = time.perf_counter()
        for number in range(MOST_ROUNDS):
            if number >= LEAST_ROUNDS and time.perf_counter() - begun > BUDGET_SECONDS:
                break
            for key in order:
                action = jobs[key]()
                action()  # what ran before is not to tell on it
                found[key].append(seconds(action))
    return {key: 1e3 * min(each) for key, each in found.items()}


def _error(
    samples: Sequence[_Sample], layers: Sequence[LayerTimes], times: Times, block: int
) -> float:
    """How far the checks are from what a block says, in milliseconds over all layers."""
    total = 0.0
    for sample, layer in zip(samples, layers, strict=True):
        interpolate = Interpolation([layer], block)
        for read, written, call in sample.checks:
            expected = interpolate(np.array([read]), np.array([written]))
            total += abs(float(expected[0]) - times[call.key])
    return total


def combination(terms: Numbers, totals: Numbers) -> list[float]:
    """What the columns of `terms` `[total, term]` are multiplied by to give the totals.

    By least squares, none of them below 0; of so few terms every choice is tried.
    """
    count = terms.shape[1]
    best, least = np.zeros(count), float(np.square(totals).sum())
    for number in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), number)):
            factors = np.zeros(count)
            factors[chosen] = np.linalg.lstsq(terms[:, chosen], totals)[0]
            error = float(np.square(terms @ factors - totals).sum())
            if (factors >= 0).all() and error < least - 1e-12:
                best, least = factors, error
    return [float(factor) for factor in best]
