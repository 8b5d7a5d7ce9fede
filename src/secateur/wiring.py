"""Which channels of a network live and die together.

Every axis of every parameter gets channel ids. The ids ride along the tensors of the traced graph:
activations, norms and pooling keep them, concatenation joins them, flattening repeats them,
addition and convolution tie them. Ids that end up tied are one channel. A channel that meets an
operation without a rule, a size baked into the user's code, or the network's input or output is
frozen, and says why; it is never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.channels import Axes, ChannelSpread, Ids, Layer, Reader, feature_map, first_input
from secateur.graph import NetworkGraph, tensors_of, trace

NOT_PRUNABLE = -1


@dataclass(frozen=True)
class Slots:
    """Which channel each index of one dimension of a parameter or buffer belongs to."""

    tensor: str
    dim: int
    channels: Ids
    """`[index]`: prunable channel id, or -1 where the index must stay."""


@dataclass(frozen=True)
class Group:
    """Channels of one width that are chosen together; channel `i` is filter `i` of `name`."""

    name: str
    """The layer that writes the channels, the first one where several are tied."""
    channels: Ids
    writers: tuple[str, ...]
    """Weights whose filters (dimension 0) write the channels."""
    readers: tuple[Reader, ...]
    tap: Node
    """Where the feature maps are looked at: what the first reader reads, before any flattening."""
    tap_index: Ids
    """`[channel]`: position of each channel along dimension 1 of the tap."""

    def __len__(self) -> int:
        return len(self.channels)


@dataclass(frozen=True)
class FrozenGroup:
    """Filters of a layer that can't be cut, and the reason."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True)
class Wiring:
    """All that is needed to cut channels out of a network."""

    graph: NetworkGraph
    groups: dict[str, Group]
    frozen: tuple[FrozenGroup, ...]
    slots: tuple[Slots, ...]
    layers: tuple[Layer, ...]
    shapes: dict[str, tuple[int, ...]]
    """Shape of every parameter and buffer."""
    parameters: frozenset[str]
    """Names that count as parameters: not buffers, shared ones once."""
    size: int
    """Number of channel ids."""

    def channels_kept(self, removed: dict[str, tuple[int, ...]]) -> npt.NDArray[np.bool_]:
        """`[channel id]`: whether a channel stays when `removed` filters of each group go."""
        kept = np.ones(self.size, dtype=bool)
        for name, indices in removed.items():
            kept[self.groups[name].channels[list(indices)]] = False
        return kept

    def kept_indices(
        self, removed: dict[str, tuple[int, ...]]
    ) -> dict[str, dict[int, npt.NDArray[np.int64]]]:
        """`{tensor: {dimension: indices that stay}}` for every tensor that loses something."""
        kept = self.channels_kept(removed)
        result: dict[str, dict[int, npt.NDArray[np.int64]]] = {}
        for slots in self.slots:
            stays = (slots.channels == NOT_PRUNABLE) | kept[slots.channels]
            if not stays.all():
                result.setdefault(slots.tensor, {})[slots.dim] = np.flatnonzero(stays)
        return result

    def shapes_after(self, removed: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer when `removed` filters of each group go."""
        shapes = dict(self.shapes)
        for tensor, dims in self.kept_indices(removed).items():
            shape = list(shapes[tensor])
            for dim, indices in dims.items():
                shape[dim] = len(indices)
            shapes[tensor] = tuple(shape)
        return shapes

    def layer_macs(self, layer: Layer) -> int:
        """Multiply-accumulates of one layer for one image, before any cut."""
        return layer.positions * math.prod(self.shapes[layer.weight])

    def macs(self, removed: dict[str, tuple[int, ...]] | None = None) -> int:
        """Multiply-accumulates for one image, of layers whose kernel is a parameter.

        Products of two computed values (attention, kernels made in the forward) are not counted.
        """
        shapes = self.shapes_after(removed or {})
        return sum(layer.positions * math.prod(shapes[layer.weight]) for layer in self.layers)

    def params(self, removed: dict[str, tuple[int, ...]] | None = None) -> int:
        """Number of parameters, shared ones counted once."""
        shapes = self.shapes_after(removed or {})
        return sum(math.prod(shapes[name]) for name in self.parameters)


def make_wiring(model: nn.Module, example: Tensor, *, cut_stream: bool = False) -> Wiring:
    """The wiring of `model` for images like `example` `[image, rgb, height, width]`.

    Channels that residual sums tie over a whole stage are frozen unless `cut_stream`. Raises
    `TraceError` where `torch.export` can't follow the network.
    """
    graph = trace(model, example)
    spread = ChannelSpread(graph)
    for node in graph.nodes:
        spread.visit(node)
    spread.freeze(spread.axes[graph.output], "written to the network's output")
    if not cut_stream:
        spread.freeze(spread.summed, "tied over a whole stage by residual sums (cut_stream is off)")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    parameters = frozenset(name for name, _ in model.named_parameters())
    return _wiring_of(spread, shapes, aliases_of(model), parameters)


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """`{name: every name of the same parameter or buffer, its own included}`."""
    named = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    by_identity: dict[int, list[str]] = {}
    for name, tensor in [*named, *buffers]:
        by_identity.setdefault(id(tensor), []).append(name)
    return {name: tuple(names) for names in by_identity.values() for name in names}


def _wiring_of(
    spread: ChannelSpread,
    shapes: dict[str, tuple[int, ...]],
    aliases: dict[str, tuple[str, ...]],
    parameters: frozenset[str],
) -> Wiring:
    """The wiring that follows from ids that have been through the whole graph."""
    placeholders: dict[str, Node] = {}
    for node, name in spread.graph.tensor_names.items():
        for alias in aliases[name]:
            twin = placeholders.setdefault(alias, node)
            for one, other in zip(spread.axes[twin], spread.axes[node], strict=True):
                spread.tie(one, other)
    root = spread.roots()
    reasons = spread.reasons(root)

    def channels_of(tensor: str, dim: int) -> Ids:
        ids = spread.axes[placeholders[tensor]][dim]
        assert ids is not None
        return root[ids]

    drafts = _drafts((layer, channels_of(layer.weight, 0)) for layer in spread.layers)
    draft_of = {channel: draft for draft in drafts for channel in draft.channels}
    for reader in spread.readers:
        read = np.unique(channels_of(reader.weight, 1)).tolist()
        concerned = {id(draft_of[c]): draft_of[c] for c in read if c in draft_of}
        for draft in concerned.values():
            draft.readers.append(reader)

    groups: dict[str, Group] = {}
    frozen: list[FrozenGroup] = []
    for draft in drafts:
        name = next(iter(draft.writers.values()))
        reason = next((reasons[c] for c in draft.channels if c in reasons), None)
        if reason is None and not draft.readers:
            reason = "read by no convolution or linear layer"
        if reason is None:
            tap = feature_map(first_input(draft.readers[0].node))
            index = _positions_at(spread.axes[tap], root, draft)
            if index is not None:
                channels = np.fromiter(draft.channels, dtype=np.int64)
                writers, readers = tuple(draft.writers), tuple(draft.readers)
                groups[name] = Group(name, channels, writers, readers, tap, index)
                continue
            reason = "its channels do not lie along dimension 1 where they are read"
        frozen.append(FrozenGroup(name, len(draft.channels), reason))
    prunable = np.zeros(spread.size, dtype=bool)
    for group in groups.values():
        prunable[group.channels] = True
    slots = tuple(
        Slots(alias, dim, np.where(prunable[root[ids]], root[ids], NOT_PRUNABLE))
        for alias, node in placeholders.items()
        for dim, ids in enumerate(spread.axes[node])
        if ids is not None and prunable[root[ids]].any()
    )
    return Wiring(
        graph=spread.graph,
        groups=groups,
        frozen=tuple(frozen),
        slots=slots,
        layers=tuple(spread.layers),
        shapes=shapes,
        parameters=parameters,
        size=spread.size,
    )


@dataclass(eq=False)
class _Draft:
    """Channels found to belong together so far."""

    channels: dict[int, None]
    writers: dict[str, str]
    """Weight -> layer, in the order of execution."""
    readers: list[Reader]


def _drafts(written: Iterable[tuple[Layer, Ids]]) -> list[_Draft]:
    """Channels that are written by one layer, or by layers that share channels, together."""
    drafts: list[_Draft] = []
    member: dict[int, _Draft] = {}
    for layer, channels in written:
        found = list({id(member[c]): member[c] for c in channels.tolist() if c in member}.values())
        if not found:
            found = [_Draft({}, {}, [])]
            drafts += found
        draft, *rest = found
        for other in rest:
            draft.channels.update(other.channels)
            draft.writers.update(other.writers)
            drafts.remove(other)
        draft.writers.setdefault(layer.weight, layer.name)
        draft.channels.update(dict.fromkeys(channels.tolist()))
        member.update(dict.fromkeys(draft.channels, draft))
    return drafts


def _positions_at(axes: Axes, root: Ids, draft: _Draft) -> Ids | None:
    """Where each channel lies along dimension 1 of a value; None where one is not there."""
    ids = axes[1] if len(axes) > 1 else None
    if ids is None:
        return None
    position = {channel: i for i, channel in reversed(list(enumerate(root[ids].tolist())))}
    if not draft.channels.keys() <= position.keys():
        return None
    return np.array([position[channel] for channel in draft.channels], dtype=np.int64)
