"""Time a network's layers on this machine, so that `latency_model` can predict cut networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from secateur.engines.engine import Engine
from secateur.engines.pytorch import PyTorch
from secateur.graph.activation_memory import count_other_values
from secateur.graph.channel_ids import Ids, Layer
from secateur.graph.cut import cut
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph, Removed
from secateur.graph.layer_calls import Jobs, Key, LayerCall, jobs_of, layer_call
from secateur.graph.module_state import evaluating
from secateur.graph.tensor_sizes import Dimension
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
from secateur.pruning.ranking import rank
from secateur.runtime import distributed
from secateur.runtime.environment import environment
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
RUNS_OF_NETWORKS = 3
"""Of each network in a round: a long run is seldom free of other work on the machine."""
TABLE_ROUNDS = Rounds(fewest=3, most=15, seconds=12.0)
"""Rounds in which a latency table is measured."""
INTERLEAVED_ROUNDS = Rounds(fewest=11, most=51, seconds=5.0, warm_up=1)
"""Forward passes of each of two networks, to plan by their latency."""
SHOWN_ROUNDS = Rounds(fewest=3, most=9, seconds=2.0, warm_up=1)
"""The same where latency is only shown."""

Times = Mapping[Key, float]


def measure_latency(
    model: nn.Module,
    dependencies: DependencyGraph,
    images: Tensor,
    engine: Engine | None = None,
) -> LatencyTable:
    """Return the times of `model` and of its layers on this machine, in evaluation mode.

    The `engine` is PyTorch by default; it takes longer for one that every network is exported to.
    `images` `[image, rgb, height, width]` are repeated to a batch of `LATENCY_BATCH`. Every round
    times everything once, so that a machine that gets slower or faster favours nothing. The
    shortest time counts. Layers with the same operation and shapes are timed once.
    """
    engine = engine or PyTorch()
    hardware, cuts = _hardware(images, engine), _uniform_cuts(dependencies, engine.grid)
    samples, times = _measure(model, dependencies, cuts, images, engine)
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
        hardware=hardware,
        batch=LATENCY_BATCH,
        block=block,
        layers=layers,
        layers_factor=1 + extra,
        fixed_ms=fixed_ms,
        ms_per_value=ms_per_value,
    )


class Stopwatch:
    """Times networks beside an original one in an engine, which is PyTorch by default.

    `images` `[image, rgb, height, width]` are repeated to a batch of this `size`. It takes fewer
    passes if the result is only shown. The main process measures; every process gets its result.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        engine: Engine | None = None,
        *,
        size: int = LATENCY_BATCH,
        is_only_shown: bool = False,
    ) -> None:
        self._model = model
        self._batch = repeat_to_batch(images, size)
        self._engine = engine or PyTorch()
        self._rounds = SHOWN_ROUNDS if is_only_shown else INTERLEAVED_ROUNDS
        self._original: Callable[[], object] | None = None

    def fraction_left(self, smaller: nn.Module) -> float:
        """Return the latency of `smaller` over the original's: the ratio of medians, interleaved.

        Raises the errors of `Engine.prepare`.
        """
        with evaluating(self._model), evaluating(smaller), torch.inference_mode():
            medians = distributed.on_main_process(lambda: self._medians(smaller))
        return medians["after"] / medians["before"]

    def _medians(self, smaller: nn.Module) -> dict[str, float]:
        if self._original is None:
            self._original = self._engine.prepare(self._model, self._batch)
        passes = {"before": self._original, "after": self._engine.prepare(smaller, self._batch)}
        return interleaved_medians(passes, self._rounds)


def _hardware(images: Tensor, engine: Engine) -> Hardware:
    machine = environment(images.device)
    return Hardware(
        processor=machine.processor,
        threads=machine.threads,
        device=machine.accelerator or str(images.device),
        dtype=str(images.dtype).removeprefix("torch."),
        engine=engine.name,
        version=engine.version,
    )


def _uniform_cuts(dependencies: DependencyGraph, grid: int) -> list[Removed]:
    """Return cuts in which every group keeps the same fraction of its filters; first no cut.

    Groups keep a multiple of `grid` channels, or all.
    """
    scores = {name: torch.zeros(len(group)) for name, group in dependencies.groups.items()}
    ranking = rank(scores, dependencies, "uniform")
    steps = {
        name: [n for n in range(ranking.least[name], len(order)) if n % grid == 0] + [len(order)]
        for name, order in ranking.order.items()
    }
    filters = sum(map(len, scores.values()))
    cuts: list[Removed] = [{}]
    for fraction in FRACTIONS:
        space = SearchSpace(steps, lambda counts: sum(counts.values()), fraction * filters)
        if space.fits(space.least):  # otherwise the network can't be cut that far
            removed = ranking.removed(equal_fractions(space))
            if removed not in cuts:
                cuts.append(removed)
    return cuts


@dataclass(frozen=True, eq=False)
class _Sample:
    """The widths that a layer is timed at."""

    layer: str
    read: tuple[int, ...]
    produced: tuple[int, ...]
    grid: tuple[tuple[LayerCall, ...], ...]
    """`[read][produced]`."""
    checks: tuple[tuple[int, int, LayerCall], ...]
    """Widths read and produced between those of the grid, to choose the block by."""

    @property
    def calls(self) -> Iterable[LayerCall]:
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


def _sample(dependencies: DependencyGraph, layer: Layer, widths: LayerWidths, grid: int) -> _Sample:
    read, produced = (
        _narrowed(dimension, _grid, grid) for dimension in (widths.read, widths.produced)
    )
    whole_read, whole_produced = max(read), max(produced)

    def call(*removed: Ids) -> LayerCall:
        return layer_call(dependencies, layer, np.concatenate(removed))

    check_read, check_produced = (
        _narrowed(dimension, _checks, grid) for dimension in (widths.read, widths.produced)
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


def _narrowed(
    dimension: Dimension, widths: Callable[[int], Iterable[int]], grid: int
) -> dict[int, Ids]:
    """Return `{width: channels to remove}`, rising, near the wanted widths of a dimension.

    They are multiples of `grid` where the dimension allows, or the whole.
    """
    nothing = np.zeros(0, dtype=np.int64)
    if isinstance(dimension, int):
        return {dimension: nothing}
    if not is_prunable(dimension):
        return {len(dimension): nothing}
    channels = np.unique(dimension[dimension != NOT_PRUNABLE])
    fixed = int(np.count_nonzero(dimension == NOT_PRUNABLE))
    copies = (len(dimension) - fixed) / len(channels)
    removed: dict[int, Ids] = {}
    for wanted in widths(len(dimension)):
        width = math.ceil(wanted / grid) * grid
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


def _measure(
    model: nn.Module,
    dependencies: DependencyGraph,
    cuts: Sequence[Removed],
    images: Tensor,
    engine: Engine,
) -> tuple[list[_Sample], Times]:
    """Return the samples of all layers, and the shortest time of every job in milliseconds.

    The jobs are the calls of the samples, by their keys, and the cut networks, by the numbers of
    their cuts; these get a batch of the images. Layers that the engine can't time are timed in
    PyTorch. The shortest, since other work on the machine only adds time, and hits long jobs more
    often.
    """
    layers_and_widths = zip(dependencies.layers, widths_of(dependencies), strict=True)
    samples = [
        _sample(dependencies, layer, widths, engine.grid) for layer, widths in layers_and_widths
    ]
    calls = {call.key: call for sample in samples for call in sample.calls}
    known = engine.layer_seconds(calls)
    layers = jobs_of({key: call for key, call in calls.items() if key not in known})
    networks = [cut(model, dependencies, removed).eval() for removed in cuts]
    batch = repeat_to_batch(images, LATENCY_BATCH)
    actions = [engine.prepare(network, batch) for network in networks]
    passes: Jobs = {number: partial(_itself, action) for number, action in enumerate(actions)}
    jobs = {**passes, **layers}
    keys = [*RUNS_OF_NETWORKS * list(passes), *layers]

    def prepare(key: Key) -> Callable[[], object]:
        action = jobs[key]()
        action()  # so that the job before it does not influence the time
        return action

    with torch.inference_mode():
        times = interleaved_seconds(keys, prepare, TABLE_ROUNDS)
    shortest = {key: min(runs) for key, runs in times.items()}
    return samples, {key: 1e3 * seconds for key, seconds in {**shortest, **known}.items()}


def _itself(action: Callable[[], object]) -> Callable[[], object]:
    return action


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
