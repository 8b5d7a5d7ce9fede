"""Shows a network's feature maps to observers: one pass over the calibration set serves them all.

Images go through the network in batches of one size (`packing`), so that nothing depends on how the
calibration set was cut into batches or spread over processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Node, map_arg

from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.data.batches import check_labels
from secateur.data.concept_masks import ConceptMasks
from secateur.errors import DataError
from secateur.graph.channel_ids import argument
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Group, Tap
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.patches import Window, window_of
from secateur.graph.trace import Compute, NodeHook, Tensors, operation_name
from secateur.runtime import distributed
from secateur.runtime.module_state import tensors_of
from secateur.runtime.precision import autocast
from secateur.scoring.batching import rebatch, select_images
from secateur.scoring.concepts import ConceptInput, ConceptSource
from secateur.scoring.criteria import (
    ConsumerKernel,
    FeatureBatch,
    Kernels,
    Need,
    Observer,
    Regions,
    DeferredUpdate,
)
from secateur.scoring.thresholds import ActivationStatistics, StatisticsAccumulator

_OWN_MEMORY = {"conv2d", "batch_norm", "add", "linear"}
"""Operations whose values share memory with no other."""
LARGEST_GRID = 14
"""Responses are brought to at most so many rows and columns of cells."""


def observe(
    model: nn.Module,
    dependencies: DependencyGraph,
    batches: Callable[[], Iterable[Batch]],
    observers: Sequence[Observer],
    source: ConceptSource | None,
    settings: ScoreSection,
) -> None:
    """Shows every observer every group in every batch; the network is in evaluation mode.

    `batches()` gives the calibration set, or this process's share of it, anew each time it is
    called; at the end the observers' tallies are those of all processes. Every
    `settings.sample_every`-th image goes through the network once before, where someone must know
    what is usual. With `settings.use_labels` the concepts and the loss are those of the true class,
    without it those of the predicted class. `source` may be None where nobody asks for concepts.
    """
    state = tensors_of(model)
    parts = kernels_of(dependencies, state)
    for observer in observers:
        observer.reset(parts)
    needs: set[Need] = {need for observer in observers for need in observer.needs}
    if not needs:
        return
    if "concepts" not in needs:
        source = None
    assert source is not None or "concepts" not in needs
    way = _ForwardPass(dependencies, state, source, settings)
    usual: dict[str, ActivationStatistics] = {}
    if needs & {"usual", "thresholds"} or (source is not None and source.needs_learning):
        usual = _activation_statistics(way, batches, with_thresholds="thresholds" in needs)
    showing = _Dispatcher(way, parts, usual, observers)
    shown = 0
    for batch, count in rebatch(batches()):
        showing.run(batch, count)
        shown += count
    if not all(distributed.all_gather(shown)):
        raise DataError("no calibration images, or fewer than there are processes")
    for observer in observers:
        distributed.all_reduce_sum(observer.state())


def taps_of(group: Group) -> dict[str, Tap]:
    """The places where a group is looked at, by the name that observers know each by."""
    return {
        group.name if number == 0 else f"{group.name} (part {number + 1})": look
        for number, look in enumerate(group.taps)
    }


def kernels_of(dependencies: DependencyGraph, state: Tensors) -> dict[str, Kernels]:
    """The weights that write and read the filters of each part of each group."""
    slots = {(each.tensor, each.dim): each.channels for each in dependencies.slots}
    scales = {
        dependencies.graph.tensor_names[node.args[1]]
        for node in dependencies.graph.nodes
        if operation_name(node) == "batch_norm" and isinstance(node.args[1], Node)
    }
    found: dict[str, Kernels] = {}
    for group in dependencies.groups.values():
        position = np.full(
            len(dependencies.channel_of) + 1, -1, dtype=np.int64
        )  # the last stands for -1
        position[group.channels] = np.arange(len(group))

        def rows_of(
            name: str, dim: int, place: npt.NDArray[np.int64] = position
        ) -> tuple[Tensor, Tensor]:
            """The rows of a parameter that belong to the group, and the channel of each."""
            channels = slots.get((name, dim))
            own = np.full(0, -1) if channels is None else place[channels]
            rows = torch.from_numpy(np.flatnonzero(own >= 0))
            return state[name].movedim(dim, 0)[rows], torch.from_numpy(own[own >= 0])

        incoming = [rows_of(layer.weight, layer.filter_dim) for layer in group.layers]
        norms = [rows_of(name, 0) for name in sorted(scales)]
        readers = _consumer_kernels(dependencies, state, position, len(group))
        for name, look in taps_of(group).items():
            channel = torch.from_numpy(look.channel)
            found[name] = Kernels(
                incoming=tuple(each for each in incoming if len(each[1])),
                channel=channel,
                consumers=tuple(
                    ConsumerKernel(
                        window,
                        weights if _is_identity(channel, len(group)) else weights[:, :, channel],
                    )
                    for window, weights in readers
                ),
                norm_scales=tuple(each for each in norms if len(each[1])),
            )
    return found


def _consumer_kernels(
    dependencies: DependencyGraph, state: Tensors, position: npt.NDArray[np.int64], channels: int
) -> list[tuple[Window, Tensor]]:
    """How each layer that reads some of a group's channels moves, and `[output, tap, channel]`."""
    found: list[tuple[Window, Tensor]] = []
    for layer in dependencies.layers:
        read = layer.kernel[1 - layer.filter_dim]
        if layer.is_computed or read is None or len(read) == 1:
            continue
        own = position[dependencies.channel_of[read]]
        inputs = torch.from_numpy(np.flatnonzero(own >= 0))
        if not len(inputs):
            continue
        channel = torch.from_numpy(own[own >= 0])
        kernel = state[layer.weight].movedim((layer.filter_dim, 1 - layer.filter_dim), (0, -1))
        kernel = kernel.flatten(1, -2) if kernel.ndim > 2 else kernel[:, None]
        if operation_name(layer.node) == "conv2d" and argument(layer.node, "groups", 1) == 1:
            window = window_of(layer.node, tuple(state[layer.weight].shape[2:]))
            weights = kernel
            if not (_is_identity(inputs, kernel.shape[2]) and _is_identity(channel, channels)):
                weights = kernel.new_zeros(*kernel.shape[:2], channels)
                weights[:, :, channel] = kernel[:, :, inputs]
        else:  # each position that a linear layer reads, and each tap, counts as an output
            window = Window((1, 1))
            order = channel.argsort(stable=True)
            times = channel.bincount(minlength=channels)
            turn = torch.arange(len(order)) - (times.cumsum(0) - times).repeat_interleave(times)
            table = kernel.new_zeros(*kernel.shape[:2], int(times.max()), channels)
            table[:, :, turn, channel[order]] = kernel[:, :, inputs[order]]
            weights = table.flatten(0, 2)[:, None]
        found.append((window, weights))
    return found


def _is_identity(index: Tensor, length: int) -> bool:
    """Whether it takes all of so many, in their order: then nothing need be copied."""
    return torch.equal(index, torch.arange(length))


@dataclass(frozen=True, eq=False)
class _ForwardPass:
    """The way of a batch through the network, with the concept source served on it."""

    dependencies: DependencyGraph
    state: Tensors
    source: ConceptSource | None
    settings: ScoreSection

    @functools.cached_property
    def _in_place(self) -> dict[Node, Compute]:
        """Rectifiers that may write over what they read, as they did before the network was traced.

        Nobody else reads it, and observers have reduced it by then.
        """
        kept = {*self.dependencies.graph.outputs, None if self.source is None else self.source.node}
        found: dict[Node, Compute] = {}
        for node in self.dependencies.graph.nodes:
            read = node.args[0] if node.args else None
            if operation_name(node) != "relu" or not isinstance(read, Node) or read in kept:
                continue
            if len(read.users) == 1 and operation_name(read) in _OWN_MEMORY:
                found[node] = functools.partial(_relu_in_place, read)
        return found

    @functools.cached_property
    def _row_by_row(self) -> dict[Node, Compute]:
        """Linear layers that answer to each image by itself.

        The matrix product of some machines rounds a row by its place among the rows, and gradients
        would then depend on which images a process gets.
        """
        return {
            node: functools.partial(_linear_row_by_row, node)
            for node in self.dependencies.graph.nodes
            if operation_name(node) == "linear"
        }

    def forward(
        self, batch: Batch, taps: Mapping[Node, NodeHook], *, with_gradients: bool
    ) -> ConceptInput:
        """Runs the network, with `taps` on the way; what the source must see of it."""
        node = None if self.source is None else self.source.node
        wants_leaf = self.source is not None and self.source.needs_gradient
        captured: list[Tensor] = []

        def capture(value: Tensor) -> Tensor:
            if node is not None and node in taps:
                taps[node](value)
            if not with_gradients:
                value = value.detach().requires_grad_(wants_leaf)
            captured.append(value)
            return value

        images, instead = batch.images, self._in_place
        if with_gradients:
            images = images.detach().clone().requires_grad_()
            instead = {**instead, **self._row_by_row}
        walk = GraphInterpreter(self.dependencies.graph, self.state, images)
        with autocast(self.settings.precision):
            with torch.set_grad_enabled(with_gradients):
                walk.advance(node, after=taps, overrides=instead)
            after = taps if node is None else {**taps, node: capture}
            with torch.set_grad_enabled(with_gradients or wants_leaf):
                walk.advance(after=after, overrides=instead)
        return ConceptInput(
            images=batch.images,
            indices=batch.indices,
            labels=batch.labels if self.settings.use_labels else None,
            annotations=batch.annotations,
            value=captured[0] if captured else None,
            logits=walk.value(self.dependencies.graph.output),
        )


def _linear_row_by_row(node: Node, lookup: Callable[[Node], Any]) -> Tensor:
    """A linear layer's value, row by row of its first axis."""
    assert callable(node.target)
    read: Any = map_arg(tuple(node.args), lookup)
    value, *others = read
    return torch.cat([node.target(row[None].clone(), *others) for row in value])


def _relu_in_place(read: Node, lookup: Callable[[Node], Tensor]) -> Tensor:
    """The rectified value of a node, which is lost unless gradients must flow."""
    value = lookup(read)
    return value.relu() if torch.is_grad_enabled() else value.relu_()


def _activation_statistics(
    way: _ForwardPass, batches: Callable[[], Iterable[Batch]], *, with_thresholds: bool
) -> dict[str, ActivationStatistics]:
    """What is usual for each filter, from a sample of the images; the source learns from it too.

    From all of them where no image of the sample comes, as where none of it can be read.
    """
    tallies: dict[str, StatisticsAccumulator] = {}
    counts: list[int] = []
    settings, source = way.settings, way.source

    def see(part: str, look: Tap, value: Tensor) -> None:
        tallies[part].update(maps_of(look, value.detach())[: counts[-1]])

    for part, look in _all_taps(way.dependencies).items():
        tallies[part] = StatisticsAccumulator(
            len(look.index), settings.threshold_positions, with_thresholds=with_thresholds
        )
    for every in (settings.sample_every, 1):
        sample = (
            select_images(batch, (batch.indices % every == 0).nonzero()[:, 0])
            for batch in batches()
        )
        for batch, count in rebatch(sample):
            counts.append(count)
            scene = way.forward(batch, _tap_hooks(way.dependencies, see), with_gradients=False)
            if source is not None and source.needs_learning:
                source.learn(scene)
        if distributed.any_process(sum(counts) > 0):
            break
    if source is not None and source.needs_learning:
        source.finish_learning()
    for tally in tallies.values():
        tally.merge()
    return {part: tally.compute(settings.quantile) for part, tally in tallies.items()}


def _all_taps(dependencies: DependencyGraph) -> dict[str, Tap]:
    return {
        part: look
        for group in dependencies.groups.values()
        for part, look in taps_of(group).items()
    }


class _Dispatcher:
    """Hands the feature maps of the images on to the observers."""

    def __init__(
        self,
        way: _ForwardPass,
        parts: Mapping[str, Kernels],
        usual: Mapping[str, ActivationStatistics],
        observers: Sequence[Observer],
    ) -> None:
        self._way = way
        self._parts = parts
        self._usual = usual
        self._now = [each for each in observers if "gradients" not in each.needs and each.needs]
        self._later = [each for each in observers if "gradients" in each.needs]
        self._grid = _grid(way)
        self._count = 0
        self._numbers = torch.zeros(0, dtype=torch.int64)
        self._votes: list[DeferredUpdate] = []
        self._is_loss = False
        """Whether what flows back is the gradient of the loss, not one that a source asked for."""

    def run(self, batch: Batch, count: int) -> None:
        """Shows the first `count` images of a batch."""
        self._count, self._numbers = count, batch.indices[:count]
        self._votes, self._is_loss = [], False
        way, source = self._way, self._way.source
        taps = _tap_hooks(way.dependencies, self._on_value)
        scene = way.forward(batch, taps, with_gradients=bool(self._later))
        if not bool(scene.logits.isfinite().all()):
            raise DataError("the network answers with values that are not finite")
        if source is not None:
            regions = Regions(_first(source.find(scene), count))
            for vote in self._votes:
                vote(regions)
        if self._later:
            logits = scene.logits[:count].float()
            labels = scene.labels
            labels = logits.detach().argmax(1) if labels is None else labels[:count]
            check_labels(labels, logits.shape[1])
            self._is_loss = True
            F.cross_entropy(logits, labels, reduction="sum").backward()

    def _on_value(self, part: str, look: Tap, value: Tensor) -> None:
        maps = maps_of(look, value.detach())[: self._count]
        self._update(self._now, part, maps, None)

        if self._later:
            value.register_hook(functools.partial(self._on_gradient, part, look, maps))

    def _on_gradient(self, part: str, look: Tap, maps: Tensor, gradient: Tensor) -> None:
        if self._is_loss:
            self._update(self._later, part, maps, maps_of(look, gradient)[: self._count])

    def _update(
        self, observers: Sequence[Observer], part: str, maps: Tensor, gradients: Tensor | None
    ) -> None:
        size = maps.shape[2:]
        sight = FeatureBatch(
            tap=part,
            maps=maps,
            indices=self._numbers,
            kernels=self._parts[part],
            statistics=self._usual.get(part),
            grid=(min(size[0], self._grid[0]), min(size[1], self._grid[1])),
            gradients=gradients,
        )
        for observer in observers:
            vote = observer.update(sight)
            if vote is not None:
                self._votes.append(vote)


def _grid(way: _ForwardPass) -> tuple[int, int]:
    """The cells that responses are brought to: those that the source works on, if not too many."""
    node = None if way.source is None else way.source.node
    if node is None:
        return LARGEST_GRID, LARGEST_GRID
    height, width = (int(size) for size in node.meta["val"].shape[2:])
    return min(height, LARGEST_GRID), min(width, LARGEST_GRID)


def _first(found: ConceptMasks, count: int) -> ConceptMasks:
    return ConceptMasks(found.masks[:count], found.concepts[:count])


def maps_of(tap: Tap, value: Tensor) -> Tensor:
    """`[image, filter, h, w]` of a part of a group, whichever dimension the channels lie along."""
    maps = value.movedim(tap.dim, 1)
    places = maps.shape[2:]
    height = places[0] if len(places) else 1
    maps = maps.reshape(*maps.shape[:2], height, -1)
    if len(tap.index) == maps.shape[1]:
        return maps
    return maps[:, torch.from_numpy(tap.index)]


def _tap_hooks(
    dependencies: DependencyGraph, show: Callable[[str, Tap, Tensor], None]
) -> dict[Node, NodeHook]:
    """What to do at each node that is looked at, for all groups that are seen there."""
    parts_at: dict[Node, list[tuple[str, Tap]]] = {}
    for part, look in _all_taps(dependencies).items():
        parts_at.setdefault(look.node, []).append((part, look))

    def see(node: Node, value: Tensor) -> None:
        for part, look in parts_at[node]:
            show(part, look, value)

    return {node: functools.partial(see, node) for node in parts_at}
