"""The pass over the calibration set that shows every observer the network's feature maps.

One pass serves all observers (criteria, dissection). Images go through the network in batches of
one size (`batching`), so that nothing depends on how the calibration set was cut into batches or
spread over processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node, map_arg

from secateur.config import ScoreSection
from secateur.data import Batch
from secateur.data.concept_masks import ConceptMasks
from secateur.graph.dependency import DependencyGraph
from secateur.graph.groups import Tap
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.module_state import device_of, tensors_of
from secateur.graph.network_graph import Compute, NodeHook, Tensors, operation_name
from secateur.graph.taps import Kernels, all_taps, kernels_of, maps_of
from secateur.models.task import SINGLE_LABEL, Task
from secateur.runtime import distributed
from secateur.runtime.device import full_float32, sums_device
from secateur.runtime.errors import DataError
from secateur.runtime.precision import autocast
from secateur.scoring.batching import rebatch, select_images
from secateur.scoring.concepts import ConceptInput, ConceptSource
from secateur.scoring.criteria import DeferredUpdate, FeatureBatch, Need, Observer, Regions
from secateur.scoring.thresholds import ActivationStatistics, StatisticsAccumulator

_OWN_MEMORY = {"conv2d", "batch_norm", "add", "linear"}
"""Operations whose values share memory with no other."""
LARGEST_GRID = 14
"""The most rows and columns of cells that responses are averaged to."""


@full_float32()
def run_feature_pass(
    model: nn.Module,
    dependencies: DependencyGraph,
    batches: Callable[[], Iterable[Batch]],
    observers: Sequence[Observer],
    source: ConceptSource | None,
    settings: ScoreSection,
    task: Task = SINGLE_LABEL,
) -> None:
    """Show every observer every tap in every batch, with the network in evaluation mode.

    Observers see what is on the network's device, or on the CPU if that device has no float64.
    `batches()` returns the calibration set, or this process's shard of it, each time it is called;
    at the end the observers' states are those of all processes. Every `settings.sample_every`-th
    image goes through the network once before, if an observer needs activation statistics. With
    `settings.use_labels` the concepts and the loss are those of the true class, without it those of
    the predicted class. `source` may be None if no observer needs concepts. `task` says how the
    network's outputs are read.
    """
    state = tensors_of(model)
    device = sums_device(device_of(model))
    kernels = kernels_of(dependencies, {name: t.to(device) for name, t in state.items()})
    taps = all_taps(dependencies)
    for observer in observers:
        observer.reset(kernels)
    needs: set[Need] = {need for observer in observers for need in observer.needs}
    if not needs:
        return
    if "concepts" not in needs:
        source = None
    assert source is not None or "concepts" not in needs
    forward_pass = _ForwardPass(dependencies, state, source, settings, task, device)
    dispatcher = _Dispatcher(forward_pass, taps, kernels, observers)
    if needs & {"statistics", "thresholds"} or (source is not None and source.needs_learning):
        dispatcher.statistics = _activation_statistics(
            forward_pass, taps, batches, with_thresholds="thresholds" in needs
        )
    images_seen = 0
    for batch, count in rebatch(batches()):
        dispatcher.run(batch, count)
        images_seen += count
    if not all(distributed.all_gather(images_seen)):
        raise DataError("no calibration images, or fewer than there are processes")
    for observer in observers:
        distributed.all_reduce_sum(observer.state())


@dataclass(frozen=True, eq=False)
class _ForwardPass:
    """Runs batches through the network, with what the concept source needs on the way."""

    dependencies: DependencyGraph
    state: Tensors
    source: ConceptSource | None
    settings: ScoreSection
    task: Task
    sums_device: torch.device
    """Where observers see feature maps."""

    @functools.cached_property
    def _in_place(self) -> dict[Node, Compute]:
        """Rectifiers that may overwrite their input, as they did before the network was traced.

        Nothing else reads that input, and observers have reduced it by then.
        """
        kept = {*self.dependencies.graph.outputs, None if self.source is None else self.source.node}
        overrides: dict[Node, Compute] = {}
        for node in self.dependencies.graph.nodes:
            read = node.args[0] if node.args else None
            if operation_name(node) != "relu" or not isinstance(read, Node) or read in kept:
                continue
            if len(read.users) == 1 and operation_name(read) in _OWN_MEMORY:
                overrides[node] = functools.partial(_relu_in_place, read)
        return overrides

    @functools.cached_property
    def _row_by_row(self) -> dict[Node, Compute]:
        """Linear layers that compute each image by itself.

        The matrix product of some machines rounds a row by its place among the rows, and gradients
        would then depend on which images a process gets.
        """
        return {
            node: functools.partial(_linear_row_by_row, node)
            for node in self.dependencies.graph.nodes
            if operation_name(node) == "linear"
        }

    def forward(
        self, batch: Batch, hooks: Mapping[Node, NodeHook], *, with_gradients: bool
    ) -> ConceptInput:
        """Run the network with hooks at its nodes; return what the concept source needs of it."""
        node = None if self.source is None else self.source.node
        wants_leaf = self.source is not None and self.source.needs_gradient
        captured: list[Tensor] = []

        def capture(value: Tensor) -> Tensor:
            if node is not None and node in hooks:
                hooks[node](value)
            if not with_gradients:
                value = value.detach().requires_grad_(wants_leaf)
            captured.append(value)
            return value

        images, overrides = batch.images, self._in_place
        if with_gradients:
            images = images.detach().clone().requires_grad_()
            overrides = {**overrides, **self._row_by_row}
        interpreter = GraphInterpreter(self.dependencies.graph, self.state, images)
        with autocast(self.settings.precision, images.device):
            with torch.set_grad_enabled(with_gradients):
                interpreter.advance(node, after=hooks, overrides=overrides)
            after = hooks if node is None else {**hooks, node: capture}
            with torch.set_grad_enabled(with_gradients or wants_leaf):
                leaves = interpreter.finish(after=after, overrides=overrides)
        outputs = leaves[0] if len(leaves) == 1 else tuple(leaves)
        return ConceptInput(
            images=batch.images,
            indices=batch.indices,
            labels=(
                self.task.read_labels(batch.labels, outputs) if self.settings.use_labels else None
            ),
            annotations=batch.annotations,
            value=captured[0] if captured else None,
            outputs=tuple(leaf.detach() for leaf in leaves),
            logits=self.task.read(outputs, len(images)),
        )


def _linear_row_by_row(node: Node, lookup: Callable[[Node], Any]) -> Tensor:
    """Return a linear layer's value, computed for each row of its first axis by itself."""
    assert callable(node.target)
    arguments: Any = map_arg(tuple(node.args), lookup)
    value, *parameters = arguments
    return torch.cat([node.target(row[None].clone(), *parameters) for row in value])


def _relu_in_place(read: Node, lookup: Callable[[Node], Tensor]) -> Tensor:
    """Return the rectified value of a node; overwrite the value unless gradients must flow."""
    value = lookup(read)
    return value.relu() if torch.is_grad_enabled() else value.relu_()


def _activation_statistics(
    forward_pass: _ForwardPass,
    taps: Mapping[str, Tap],
    batches: Callable[[], Iterable[Batch]],
    *,
    with_thresholds: bool,
) -> dict[str, ActivationStatistics]:
    """Return each tap's activation statistics from a sample of the images.

    The concept source learns from the same sample. If no image of the sample can be read, all
    images are used.
    """
    settings, source = forward_pass.settings, forward_pass.source
    accumulators = {
        name: StatisticsAccumulator(
            len(tap.index),
            settings.threshold_positions,
            with_thresholds=with_thresholds,
            device=forward_pass.sums_device,
        )
        for name, tap in taps.items()
    }
    counts: list[int] = []
    images = torch.zeros((), dtype=torch.int64)
    hooks = _tap_hooks(taps, functools.partial(_accumulate, accumulators, counts))
    for every in (settings.sample_every, 1):
        images.zero_()
        sample = (
            select_images(batch, (batch.indices % every == 0).nonzero()[:, 0])
            for batch in _counted(batches(), images)
        )
        for batch, count in rebatch(sample):
            counts.append(count)
            concept_input = forward_pass.forward(batch, hooks, with_gradients=False)
            if source is not None and source.needs_learning:
                source.learn(concept_input)
        if distributed.any_process(sum(counts) > 0):
            break
    if source is not None and source.needs_learning:
        source.finish_learning()
    for accumulator in accumulators.values():
        accumulator.merge()
    distributed.all_reduce_sum([images])
    return {
        name: accumulator.compute(settings.quantile, int(images))
        for name, accumulator in accumulators.items()
    }


def _counted(batches: Iterable[Batch], images: Tensor) -> Iterator[Batch]:
    """Yield the batches, and add their numbers of images to `images`."""
    for batch in batches:
        images += len(batch.indices)
        yield batch


def _accumulate(
    accumulators: Mapping[str, StatisticsAccumulator],
    counts: Sequence[int],
    name: str,
    tap: Tap,
    value: Tensor,
) -> None:
    """Add the images of a batch that count, the last of `counts`, to a tap's statistics."""
    accumulator = accumulators[name]
    accumulator.update(maps_of(tap, value.detach())[: counts[-1]].to(accumulator.device))


class _Dispatcher:
    """Passes the feature maps of each batch on to the observers."""

    def __init__(
        self,
        forward_pass: _ForwardPass,
        taps: Mapping[str, Tap],
        kernels: Mapping[str, Kernels],
        observers: Sequence[Observer],
    ) -> None:
        self._forward_pass = forward_pass
        self._kernels = kernels
        self.statistics: Mapping[str, ActivationStatistics] = {}
        """Of each tap, where an observer needs them; set before the first batch."""
        self._hooks = _tap_hooks(taps, self._on_value)
        self._forward_observers = [
            observer
            for observer in observers
            if "gradients" not in observer.needs and observer.needs
        ]
        self._gradient_observers = [
            observer for observer in observers if "gradients" in observer.needs
        ]
        self._grid = _grid(forward_pass)
        self._count = 0
        self._indices = torch.zeros(0, dtype=torch.int64)
        self._deferred: list[DeferredUpdate] = []
        self._is_loss = False
        """Whether what flows back is the gradient of the loss, not one that a source asked for."""

    def run(self, batch: Batch, count: int) -> None:
        """Show the first `count` images of a batch to the observers."""
        self._count, self._indices = count, batch.indices[:count]
        self._deferred, self._is_loss = [], False
        forward_pass, source = self._forward_pass, self._forward_pass.source
        task = forward_pass.task
        concept_input = forward_pass.forward(
            batch, self._hooks, with_gradients=bool(self._gradient_observers)
        )
        if not bool(concept_input.logits.isfinite().all()):
            raise DataError("the network's outputs hold values that are not finite")
        if source is not None:
            masks, device = source.find(concept_input), forward_pass.sums_device
            regions = Regions(
                ConceptMasks(masks.masks[:count].to(device), masks.concepts[:count].to(device))
            )
            for update in self._deferred:
                update(regions)
        if self._gradient_observers:
            logits = concept_input.logits[:count].float()
            labels = concept_input.labels
            self._is_loss = True
            task.own_loss(logits, None if labels is None else labels[:count]).backward()

    def _on_value(self, name: str, tap: Tap, value: Tensor) -> None:
        device = self._forward_pass.sums_device
        maps = maps_of(tap, value.detach())[: self._count].to(device)
        self._update(self._forward_observers, name, maps, None)

        if self._gradient_observers:
            value.register_hook(functools.partial(self._on_gradient, name, tap, maps))

    def _on_gradient(self, name: str, tap: Tap, maps: Tensor, gradient: Tensor) -> None:
        if self._is_loss:
            gradients = maps_of(tap, gradient)[: self._count].to(maps.device)
            self._update(self._gradient_observers, name, maps, gradients)

    def _update(
        self, observers: Sequence[Observer], name: str, maps: Tensor, gradients: Tensor | None
    ) -> None:
        size = maps.shape[2:]
        features = FeatureBatch(
            tap=name,
            maps=maps,
            indices=self._indices,
            kernels=self._kernels[name],
            statistics=self.statistics.get(name),
            grid=(min(size[0], self._grid[0]), min(size[1], self._grid[1])),
            gradients=gradients,
        )
        for observer in observers:
            deferred = observer.update(features)
            if deferred is not None:
                self._deferred.append(deferred)


def _grid(forward_pass: _ForwardPass) -> tuple[int, int]:
    """Return the grid that responses are averaged to: the source's own, if not too fine."""
    node = None if forward_pass.source is None else forward_pass.source.node
    if node is None:
        return LARGEST_GRID, LARGEST_GRID
    height, *sides = (int(size) for size in node.meta["val"].shape[2:])
    width = math.prod(sides)
    return min(height, LARGEST_GRID), min(width, LARGEST_GRID)


def _tap_hooks(
    taps: Mapping[str, Tap], update: Callable[[str, Tap, Tensor], None]
) -> dict[Node, NodeHook]:
    """Return a hook for each node that has taps: it calls `update` for every tap there."""
    taps_at: dict[Node, list[tuple[str, Tap]]] = {}
    for name, tap in taps.items():
        taps_at.setdefault(tap.node, []).append((name, tap))

    def call(node: Node, value: Tensor) -> None:
        for name, tap in taps_at[node]:
            update(name, tap, value)

    return {node: functools.partial(call, node) for node in taps_at}
