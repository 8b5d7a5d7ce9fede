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
from secateur.grouping import Group, Look
from secateur.thresholds import Usual, UsualTally
from secateur.wiring import Wiring

USUAL_IMAGES = 512
"""Images from which each filter's mean and threshold are estimated."""


def observe(
    model: nn.Module,
    wiring: Wiring,
    batches: Callable[[], Iterable[Batch]],
    observers: Sequence[Observer],
    source: ConceptSource | None,
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
    assert source is not None
    state = tensors_of(model)
    kernels = kernels_of(wiring, state)
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


def parts_of(group: Group) -> dict[str, Look]:
    """The places where a group is looked at, by the name that observers know each by."""
    return {
        group.name if number == 0 else f"{group.name} (part {number + 1})": look
        for number, look in enumerate(group.looks)
    }


def kernels_of(wiring: Wiring, state: State) -> dict[str, Kernels]:
    """The weights that write and read the filters of each part of each group."""
    squares = torch.zeros(len(wiring.channel_of), dtype=torch.float64)
    for layer in wiring.layers:
        read = layer.kernel[1 - layer.filter_dim]
        if layer.is_computed or read is None or len(read) == 1:
            continue
        kernel = state[layer.weight].detach().cpu().double().movedim(1 - layer.filter_dim, 0)
        channel = torch.from_numpy(wiring.channel_of[read])
        is_prunable = channel >= 0
        total = kernel.flatten(1).square().sum(1)  # [input of the layer]
        squares.index_add_(0, channel[is_prunable], total[is_prunable])
    found: dict[str, Kernels] = {}
    slots = {(each.tensor, each.dim): each.channels for each in wiring.slots}
    for group in wiring.groups.values():
        position = np.full(len(wiring.channel_of), -1, dtype=np.int64)
        position[group.channels] = np.arange(len(group))
        incoming: list[tuple[Tensor, Tensor]] = []
        for layer in group.layers:
            channels = slots.get((layer.weight, layer.filter_dim))
            if channels is not None:
                own = np.where(channels >= 0, position[channels], -1)
                rows = torch.from_numpy(np.flatnonzero(own >= 0))
                kernel = state[layer.weight].movedim(layer.filter_dim, 0)[rows]
                incoming.append((kernel, torch.from_numpy(own[own >= 0])))
        outgoing = squares.sqrt().float()[torch.from_numpy(group.channels)]
        for name, look in parts_of(group).items():
            channel = torch.from_numpy(look.channel)
            found[name] = Kernels(tuple(incoming), channel, outgoing[channel])
    return found


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

    def forward_only(self, part: str, look: Look, value: Tensor) -> None:
        """Shows the maps as they come."""
        self._show(part, look, value, None, self._observers)

    def with_gradients(self, part: str, look: Look, value: Tensor) -> None:
        """Shows the maps now to those who need no gradient, and with it to those who do."""
        maps = value.detach()
        later = [observer for observer in self._observers if observer.needs_gradients]
        now = [observer for observer in self._observers if not observer.needs_gradients]
        self._show(part, look, maps, None, now)
        value.register_hook(lambda gradient: self._show(part, look, maps, gradient, later))

    def _show(
        self,
        part: str,
        look: Look,
        value: Tensor,
        gradient: Tensor | None,
        observers: Sequence[Observer],
    ) -> None:
        maps = _maps_of(look, value)
        size = (maps.shape[2], maps.shape[3])
        if size not in self._masks:
            self._masks[size] = at_resolution(self._found.masks, size)
        sight = Sight(
            group=part,
            maps=maps,
            kernels=self._kernels[part],
            usual=self._usual[part],
            masks=self._masks[size],
            concepts=self._found.concepts,
            gradients=None if gradient is None else _maps_of(look, gradient),
        )
        for observer in observers:
            observer.observe(sight)


def _maps_of(look: Look, value: Tensor) -> Tensor:
    """`[image, filter, h, w]` of a part of a group, whichever dimension the channels lie along."""
    maps = value.movedim(look.dim, 1)
    places = maps.shape[2:]
    height = places[0] if len(places) else 1
    maps = maps.reshape(*maps.shape[:2], height, -1)
    if len(look.index) == maps.shape[1]:
        return maps
    return maps[:, torch.from_numpy(look.index)]


def _taps(wiring: Wiring, show: Callable[[str, Look, Tensor], None]) -> dict[Node, Tap]:
    """What to do at each node that is looked at, for all groups that are seen there."""
    parts_at: dict[Node, list[tuple[str, Look]]] = {}
    for group in wiring.groups.values():
        for part, look in parts_of(group).items():
            parts_at.setdefault(look.node, []).append((part, look))

    def tap(node: Node) -> Tap:
        def see(value: Tensor) -> None:
            for part, look in parts_at[node]:
                show(part, look, value)

        return see

    return {node: tap(node) for node in parts_at}


def _usual(
    wiring: Wiring, state: State, batches: Iterable[Batch], quantile: float
) -> dict[str, Usual]:
    tallies = {part: UsualTally() for group in wiring.groups.values() for part in parts_of(group)}
    taps = _taps(wiring, lambda part, look, value: tallies[part].add(_maps_of(look, value)))
    seen = 0
    with torch.inference_mode():
        for batch in batches:
            run(wiring.graph, state, batch.images, after=taps)
            seen += len(batch.images)
            if seen >= USUAL_IMAGES:
                break
    return {name: tally.finish(quantile) for name, tally in tallies.items()}
