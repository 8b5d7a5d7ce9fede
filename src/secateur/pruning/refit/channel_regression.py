"""Kernels from a regression of the channels that a layer read on those that are left.

x ≈ A x_S + b, of the original network's channels x and the cut network's x_S, is folded into the
layer: at each tap the new kernel is the original one times A, and what the kernel makes of b goes
where the layer's offset can. It needs the Gram matrix of the channels only, and serves layers that
have no patches to take, such as transposed convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.graph.network_graph import argument
from secateur.pruning.refit.candidates import (
    RIDGES,
    Candidate,
    Choice,
    LayerBatch,
    Pass,
    best_of,
    write,
)
from secateur.pruning.refit.layers import RefitLayer, at, by_group
from secateur.pruning.refit.least_squares import Gram
from secateur.pruning.refit.regression_targets import OffsetPlace, State, bias_of
from secateur.runtime import distributed


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels that a layer reads, by the group of the cut network that they are in.

    Where a map was flattened before a linear layer, each channel is several of its inputs.
    """

    consumer: RefitLayer
    whole: Int[Tensor, "group channel copy"]
    """Places in the original network's dimension, of groups that stay."""
    left: Int[Tensor, "group stays copy"]
    """Places in the cut network's dimension."""
    stays: Int[Tensor, "group stays"]
    """Number of each channel that stays, among those of its group."""

    def maps(self, value: Tensor, places: Tensor) -> Float[Tensor, "image channel position"]:
        """Channels of a value by group, with copies as further positions."""
        maps = self.consumer.maps(value)
        taken = maps.index_select(1, places.flatten().to(maps.device))
        shape = (len(maps), places.shape[0] * places.shape[1], places.shape[2], maps.shape[2])
        return taken.reshape(shape).flatten(2)

    def reconstruction(self, device: torch.device) -> Float[Tensor, "group channel stays"]:
        """The map that leaves the kernel as cut: each channel that stays stands for itself."""
        groups, channels, _ = self.whole.shape
        result = torch.zeros(groups, channels, self.stays.shape[1], dtype=torch.float64)
        return result.scatter_(1, self.stays[:, None], 1.0).to(device)

    def original_kernel(self, kernel: Tensor) -> Float[Tensor, "group output channel tap"]:
        """The original network's kernel, of outputs that stay, over all channels of a group."""
        consumer = self.consumer
        groups, channels, _ = self.whole.shape
        if consumer.is_transposed:  # [groups x channels, outputs of a group, ...]
            rows = kernel.flatten(2).reshape(-1, channels, *kernel.shape[1:2], kernel[0, 0].numel())
            rows = rows.transpose(1, 2).flatten(0, 1)
        elif consumer.is_linear:
            rows = kernel[:, self.whole[0].to(kernel.device)]
        else:
            rows = kernel.reshape(*kernel.shape[:2], -1)
        outputs = consumer.remains.mask(consumer.node, consumer.channel_dim)
        index = torch.from_numpy(np.flatnonzero(outputs)).to(kernel.device)
        rows = rows.index_select(0, index).double()
        return rows.reshape(groups, -1, *rows.shape[1:])

    def as_kernel(
        self, rows: Float[Tensor, "group output stays tap"], shape: torch.Size
    ) -> Float[Tensor, "..."]:
        """A kernel of the cut network, of a shape."""
        if self.consumer.is_transposed:
            return rows.transpose(1, 2).reshape(shape)
        if self.consumer.is_linear:
            result = rows.new_zeros(shape)
            result[:, self.left.flatten().to(rows.device)] = rows[0].flatten(1)
            return result
        return rows.reshape(shape)


def channels_of(consumer: RefitLayer) -> Channels:
    """The channels that a layer reads."""
    dependencies, source, dim = consumer.remains.dependencies, consumer.source, consumer.channel_dim
    stays = consumer.remains.mask(source, dim)
    ids = dependencies.axes[source][dim]
    copies = np.arange(len(stays))[:, None]  # [channel, copy]
    if consumer.is_linear and ids is not None:
        _, times = np.unique(ids, return_counts=True)
        if (times == times[0]).all():
            copies = np.argsort(ids, kind="stable").reshape(len(times), times[0])
    channel_stays = stays[copies[:, 0]].astype(bool)
    left = (np.cumsum(stays) - 1)[copies[channel_stays]]
    # A group of the original network goes as a whole, or keeps as many channels as the others.
    original_groups = int(argument(consumer.node, "groups", 1))
    parted = channel_stays.reshape(original_groups, -1)
    parted = parted[parted.any(1)]
    whole = copies.reshape(original_groups, -1, copies.shape[1])
    whole = whole[channel_stays.reshape(original_groups, -1).any(1)]
    return Channels(
        consumer,
        torch.from_numpy(whole),
        torch.from_numpy(left).reshape(len(whole), -1, copies.shape[1]),
        torch.from_numpy(np.nonzero(parted)[1]).reshape(len(whole), -1),
    )


class ChannelRegression:
    """See `estimates.Form`."""

    def __init__(
        self,
        consumers: Sequence[RefitLayer],
        full_state: State,
        state: State,
        place: OffsetPlace | None,
    ) -> None:
        self._channels = [channels_of(consumer) for consumer in consumers]
        self._state = state
        self._place = place
        self._weight = consumers[0].layer.weight
        device = state[self._weight].device
        self._original = self._channels[0].original_kernel(full_state[self._weight])
        self._old = self._channels[0].reconstruction(device)
        groups, outputs, inputs = self._old.shape
        self._fit = Gram(groups, inputs, outputs, device)
        self._held_out = torch.zeros((), dtype=torch.int64, device=device)
        self._candidates: list[Candidate] = []
        filters = self._original.shape[0] * self._original.shape[1]
        sums = torch.zeros(2, filters, dtype=torch.float64, device=device)
        self._count, self._y, self._yy = sums.new_zeros(()), sums[0], sums[1]
        self._errors = sums.new_zeros(1 + len(RIDGES))

    @property
    def passes(self) -> Sequence[Pass]:
        """See `estimates.Form`: the first one for the map of channels, the other to compare."""
        return [(self._add, self._solve), (self._compare, self._merge)]

    def choice(self) -> Choice:
        """See `estimates.Form`."""
        variance = (self._yy / self._count - (self._y / self._count).square()).sum()
        errors = self._errors / self._count / variance.clamp_min(1e-30)
        best, choice = best_of(self._candidates, errors.tolist())
        write(self._state, self._weight, best, self._place)
        return choice

    def _add(self, number: int, look: LayerBatch) -> None:
        channels, fitting = self._channels[number], ~look.held_out
        self._held_out += look.held_out.sum()
        assert look.originals is not None
        read = channels.maps(look.inputs[fitting], channels.left)
        wanted = channels.maps(look.originals[fitting], channels.whole)
        chosen = look.spread.over(read.shape[2])[fitting.cpu()]
        groups = len(channels.whole)
        self._fit.add(by_group(at(read, chosen), groups), by_group(at(wanted, chosen), groups))

    def _solve(self) -> None:
        distributed.all_reduce_sum([*self._fit.state(), self._held_out])
        nothing = torch.zeros_like(self._fit.y)
        weight = self._state[self._weight]
        self._candidates = [Candidate(None, weight, torch.zeros_like(self._y))]
        for ridge in RIDGES:
            mixing, shift = self._fit.ridge(self._old, ridge, None if self._place else nothing)
            rows = torch.einsum("goct,gcs->gost", self._original, mixing)
            offset = torch.einsum("goct,gc->go", self._original, shift).flatten()
            if self._place is not None:
                offset = self._place.rounded(self._state, offset)
            kernel = self._channels[0].as_kernel(rows, weight.shape).to(weight.dtype)
            self._candidates.append(Candidate(ridge, kernel, offset))

    def _compare(self, number: int, look: LayerBatch) -> None:
        consumer = self._channels[number].consumer
        images = look.held_out if self._held_out else ~look.held_out
        wanted = look.target.wanted[images].double()
        chosen = look.spread.over(consumer.positions)[images.cpu()]
        self._count += wanted.shape[0] * wanted.shape[1]
        self._y += wanted.sum((0, 1))
        self._yy += wanted.square().sum((0, 1))
        for place, candidate in enumerate(self._candidates):
            answer = consumer.output(look.inputs[images], candidate.kernel, self._state)
            found = at(answer, chosen).double() + candidate.offset
            bias = bias_of(consumer)
            if bias is not None:
                found -= self._state[bias].double()
            self._errors[place] += (wanted - found).square().sum()

    def _merge(self) -> None:
        distributed.all_reduce_sum([self._count, self._y, self._yy, self._errors])
