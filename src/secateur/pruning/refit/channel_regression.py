"""The `channel` form: regress a layer's original input channels on the remaining ones.

The regression x ≈ A x_S + b, of the original network's channels x on the cut network's channels
x_S, is folded into the layer: at each tap the new kernel is the original one times A, and the
kernel's output for b is added to the layer's offset. It needs the Gram matrix of the channels only.
So it also serves layers without patches, such as transposed convolutions.
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
    Regression,
    best_of,
    write,
)
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.least_squares import Gram
from secateur.pruning.refit.regression_targets import OffsetPlace, State
from secateur.pruning.refit.rows import at_positions, by_group
from secateur.runtime import distributed


@dataclass(frozen=True, eq=False)
class Channels:
    """The input channels of a layer, by group of the cut network.

    If a map is flattened before a linear layer, each channel is several of its inputs: copies.
    """

    layer: RefitLayer
    whole: Int[Tensor, "group channel copy"]
    """Places in the original network's dimension, of groups that stay."""
    left: Int[Tensor, "group stays copy"]
    """Places in the cut network's dimension."""
    stays: Int[Tensor, "group stays"]
    """Number of each remaining channel among those of its group."""

    def maps(self, value: Tensor, places: Tensor) -> Float[Tensor, "image channel position"]:
        """Return channels of a value by group, with copies as further positions."""
        maps = self.layer.maps(value)
        channels = maps.index_select(1, places.flatten().to(maps.device))
        shape = (len(maps), places.shape[0] * places.shape[1], places.shape[2], maps.shape[2])
        return channels.reshape(shape).flatten(2)

    def selection(self, device: torch.device) -> Float[Tensor, "group channel stays"]:
        """Return the map A that leaves the kernel as cut: it keeps each remaining channel."""
        groups, channels, _ = self.whole.shape
        result = torch.zeros(groups, channels, self.stays.shape[1], dtype=torch.float64)
        return result.scatter_(1, self.stays[:, None], 1.0).to(device)

    def original_kernel(self, kernel: Tensor) -> Float[Tensor, "group output channel tap"]:
        """Return the original network's kernel for remaining outputs and all input channels."""
        layer = self.layer
        groups, channels, _ = self.whole.shape
        if layer.is_transposed:  # [groups x channels, outputs of a group, ...]
            rows = kernel.flatten(2).reshape(-1, channels, *kernel.shape[1:2], kernel[0, 0].numel())
            rows = rows.transpose(1, 2).flatten(0, 1)
        elif layer.is_linear:
            rows = kernel[:, self.whole[0].to(kernel.device)]
        else:
            rows = kernel.reshape(*kernel.shape[:2], -1)
        outputs = layer.kept.mask(layer.node, layer.channel_dim)
        index = torch.from_numpy(np.flatnonzero(outputs)).to(kernel.device)
        rows = rows.index_select(0, index).double()
        return rows.reshape(groups, -1, *rows.shape[1:])

    def as_kernel(
        self, rows: Float[Tensor, "group output stays tap"], shape: torch.Size
    ) -> Float[Tensor, "..."]:
        """Return the rows as a kernel of the cut network, in its shape."""
        if self.layer.is_transposed:
            return rows.transpose(1, 2).reshape(shape)
        if self.layer.is_linear:
            result = rows.new_zeros(shape)
            result[:, self.left.flatten().to(rows.device)] = rows[0].flatten(1)
            return result
        return rows.reshape(shape)


def channels_of(layer: RefitLayer) -> Channels:
    """Return the input channels of a layer."""
    source, dim = layer.source, layer.channel_dim
    stays = layer.kept.mask(source, dim)
    ids = layer.kept.dependencies.axes[source][dim]
    copies = np.arange(len(stays))[:, None]  # [channel, copy]
    if layer.is_linear and ids is not None:
        _, times = np.unique(ids, return_counts=True)
        if (times == times[0]).all():
            copies = np.argsort(ids, kind="stable").reshape(len(times), times[0])
    channel_stays = stays[copies[:, 0]].astype(bool)
    left = (np.cumsum(stays) - 1)[copies[channel_stays]]
    # A group of the original network is removed whole, or keeps as many channels as the others.
    original_groups = int(argument(layer.node, "groups", 1))
    group_stays = channel_stays.reshape(original_groups, -1)
    group_stays = group_stays[group_stays.any(1)]
    whole = copies.reshape(original_groups, -1, copies.shape[1])
    whole = whole[channel_stays.reshape(original_groups, -1).any(1)]
    return Channels(
        layer,
        torch.from_numpy(whole),
        torch.from_numpy(left).reshape(len(whole), -1, copies.shape[1]),
        torch.from_numpy(np.nonzero(group_stays)[1]).reshape(len(whole), -1),
    )


class ChannelRegression(Regression):
    """Estimates a kernel from a map of channels."""

    reads_originals = True

    def __init__(
        self,
        layers: Sequence[RefitLayer],
        original_kernel: Tensor,
        state: State,
        place: OffsetPlace | None,
    ) -> None:
        self._channels = [channels_of(layer) for layer in layers]
        self._state = state
        self._place = place
        self._weight = layers[0].layer.weight
        device = state[self._weight].device
        self._original = self._channels[0].original_kernel(original_kernel)
        self._as_cut = self._channels[0].selection(device)
        nothing = self._as_cut.new_zeros(self._as_cut.shape[:2])
        self._fit = Gram(self._as_cut, None if place else nothing)
        self._held_out = torch.zeros((), dtype=torch.int64, device=device)
        self._candidates: list[Candidate] = []
        filters = self._original.shape[0] * self._original.shape[1]
        sums = torch.zeros(2, filters, dtype=torch.float64, device=device)
        self._count, self._y, self._yy = sums.new_zeros(()), sums[0], sums[1]
        self._errors = sums.new_zeros(1 + len(RIDGES))

    @property
    def passes(self) -> Sequence[Pass]:
        """The first pass solves for the map of channels; the second compares the candidates."""
        return [(self._add, self._solve), (self._compare, self._merge)]

    def choice(self) -> Choice:
        """Write the best kernel and offset, and return their errors."""
        variance = (self._yy / self._count - (self._y / self._count).square()).sum()
        errors = self._errors / self._count / variance.clamp_min(1e-30)
        best, choice = best_of(self._candidates, errors.tolist())
        write(self._state, self._weight, best, self._place)
        return choice

    def _add(self, number: int, batch: LayerBatch) -> None:
        channels, fitting = self._channels[number], ~batch.held_out
        self._held_out += batch.held_out.sum()
        assert batch.originals is not None
        read = channels.maps(batch.inputs[fitting], channels.left)
        wanted = channels.maps(batch.originals[fitting], channels.whole)
        positions = batch.sampling.over(read.shape[2])[fitting.cpu()]
        groups = len(channels.whole)
        self._fit.add(
            by_group(at_positions(read, positions), groups),
            by_group(at_positions(wanted, positions), groups),
        )

    def _solve(self) -> None:
        self._fit.merge()
        distributed.all_reduce_sum([self._held_out])
        weight = self._state[self._weight]
        self._candidates = [Candidate(None, weight, torch.zeros_like(self._y))]
        for ridge in RIDGES:
            mixing, shift = self._fit.ridge(ridge)
            rows = torch.einsum("goct,gcs->gost", self._original, mixing)
            offset = torch.einsum("goct,gc->go", self._original, shift).flatten()
            if self._place is not None:
                offset = self._place.rounded(self._state, offset)
            kernel = self._channels[0].as_kernel(rows, weight.shape).to(weight.dtype)
            self._candidates.append(Candidate(ridge, kernel, offset))

    def _compare(self, number: int, batch: LayerBatch) -> None:
        layer = self._channels[number].layer
        images = batch.held_out if self._held_out else ~batch.held_out
        wanted = batch.targets.wanted[images].double()
        positions = batch.sampling.over(layer.positions)[images.cpu()]
        self._count += wanted.shape[0] * wanted.shape[1]
        self._y += wanted.sum((0, 1))
        self._yy += wanted.square().sum((0, 1))
        for place, candidate in enumerate(self._candidates):
            maps = layer.output(batch.inputs[images], candidate.kernel, self._state)
            outputs = at_positions(maps, positions).double() + candidate.offset
            if layer.bias is not None:
                outputs -= self._state[layer.bias].double()
            self._errors[place] += (wanted - outputs).square().sum()

    def _merge(self) -> None:
        distributed.all_reduce_sum([self._count, self._y, self._yy, self._errors])
