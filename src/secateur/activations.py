"""Shows a network's feature maps to observers: one pass over the probe set serves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.concepts import ConceptMasks, ConceptSource, at_resolution
from secateur.criteria import Kernels, Observer, Sight
from secateur.data import Batch
from secateur.evaluate import check_labels
from secateur.graph import State, Tap, run, tensors_of
from secateur.thresholds import Usual, UsualTally
from secateur.wiring import Group, Wiring

USUAL_IMAGES = 512
"""Images from which each filter's mean and threshold are estimated."""


def observe(
    model: nn.Module,
    wiring: Wiring,
    batches: Callable[[], Iterable[Batch]],
    observers: Sequence[Observer],
    source: ConceptSource,
    *,
    quantile: float,
    use_labels: bool,
) -> None:
    """Shows every observer every group in every batch; the network is in evaluation mode.

    `batches()` gives the probe set anew each time it is called. `quantile` is the share of
    positions at which a filter exceeds its threshold. With `use_labels` the concepts and the loss
    are those of the true class, without it those of the predicted class.
    """
    observers = [observer for observer in observers if observer.needs_images]
    if not observers:
        return
    state = tensors_of(model)
    kernels = {name: kernels_of(wiring, group, state) for name, group in wiring.groups.items()}
    usual = _usual(wiring, state, batches(), quantile)
    with_gradients = any(observer.needs_gradients for observer in observers)
    for batch in batches():
        labels = batch.labels if use_labels else None
        show = _Showing(observers, kernels, usual, source.find(batch.images, labels))
        taps = _taps(wiring, show.with_gradients if with_gradients else show.forward_only)
        if not with_gradients:
            with torch.inference_mode():
                run(wiring.graph, state, batch.images, after=taps)
            continue
        images = batch.images.detach().clone().requires_grad_()
        logits = run(wiring.graph, state, images, after=taps)
        if labels is None:
            labels = logits.detach().argmax(1)
        check_labels(labels, logits.shape[1])
        F.cross_entropy(logits, labels, reduction="sum").backward()


def kernels_of(wiring: Wiring, group: Group, state: State) -> Kernels:
    """The weights that write and read the channels of a group."""
    position = np.full(wiring.size, -1, dtype=np.int64)
    position[group.channels] = np.arange(len(group))
    squares = torch.zeros(len(group), dtype=torch.float64)
    incoming = []
    for slots in wiring.slots:
        if slots.dim == 0 and slots.tensor in group.writers:
            order = torch.from_numpy(position[slots.channels].argsort())
            incoming.append(state[slots.tensor][order])
        if slots.dim == 1 and any(reader.weight == slots.tensor for reader in group.readers):
            here = torch.from_numpy(np.where(slots.channels >= 0, position[slots.channels], -1))
            weight = state[slots.tensor].detach().cpu().double()
            total = weight.movedim(1, 0).flatten(1).square().sum(1)  # [input of the reader]
            squares.index_add_(0, here[here >= 0], total[here >= 0])
    return Kernels(tuple(incoming), squares.sqrt().float())


class _Showing:
    """Hands the feature maps of one batch on to the observers."""

    def __init__(
        self,
        observers: Sequence[Observer],
        kernels: dict[str, Kernels],
        usual: dict[str, Usual],
        found: ConceptMasks,
    ) -> None:
        self._observers = observers
        self._kernels = kernels
        self._usual = usual
        self._found = found
        self._masks: dict[tuple[int, int], Tensor] = {}

    def forward_only(self, group: Group, value: Tensor) -> None:
        """Shows the maps as they come."""
        self._show(group, value, None, self._observers)

    def with_gradients(self, group: Group, value: Tensor) -> None:
        """Shows the maps now to those who need no gradient, and with it to those who do."""
        maps = value.detach()
        later = [observer for observer in self._observers if observer.needs_gradients]
        now = [observer for observer in self._observers if not observer.needs_gradients]
        self._show(group, maps, None, now)
        value.register_hook(lambda gradient: self._show(group, maps, gradient, later))

    def _show(
        self, group: Group, value: Tensor, gradient: Tensor | None, observers: Sequence[Observer]
    ) -> None:
        maps = _maps_of(group, value)
        size = (maps.shape[2], maps.shape[3])
        if size not in self._masks:
            self._masks[size] = at_resolution(self._found.masks, size)
        sight = Sight(
            group=group.name,
            maps=maps,
            kernels=self._kernels[group.name],
            usual=self._usual[group.name],
            masks=self._masks[size],
            concepts=self._found.concepts,
            gradients=None if gradient is None else _maps_of(group, gradient),
        )
        for observer in observers:
            observer.observe(sight)


def _maps_of(group: Group, value: Tensor) -> Tensor:
    """`[image, filter, h, w]` of a group from the value at its tap."""
    maps = value.reshape(*value.shape[:2], *(value.shape[2:] or (1, 1)))
    if len(group) == maps.shape[1] and bool((np.diff(group.tap_index) == 1).all()):
        return maps
    return maps[:, torch.from_numpy(group.tap_index)]


def _taps(wiring: Wiring, show: Callable[[Group, Tensor], None]) -> dict[Node, Tap]:
    """What to do at each tapped node, for all groups that are seen there."""
    groups_at: dict[Node, list[Group]] = {}
    for group in wiring.groups.values():
        groups_at.setdefault(group.tap, []).append(group)

    def tap(node: Node) -> Tap:
        def look(value: Tensor) -> None:
            for group in groups_at[node]:
                show(group, value)

        return look

    return {node: tap(node) for node in groups_at}


def _usual(
    wiring: Wiring, state: State, batches: Iterable[Batch], quantile: float
) -> dict[str, Usual]:
    tallies = {name: UsualTally() for name in wiring.groups}
    taps = _taps(wiring, lambda group, value: tallies[group.name].add(_maps_of(group, value)))
    seen = 0
    with torch.inference_mode():
        for batch in batches:
            run(wiring.graph, state, batch.images, after=taps)
            seen += len(batch.images)
            if seen >= USUAL_IMAGES:
                break
    return {name: tally.finish(quantile) for name, tally in tallies.items()}
