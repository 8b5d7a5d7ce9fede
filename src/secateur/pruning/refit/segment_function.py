"""The values at a segment's targets as a function of its kernels, and the derivatives of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.graph.interpreter import GraphInterpreter, apply
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import Compute, NodeHook
from secateur.pruning.refit.regression_targets import State
from secateur.pruning.refit.segments import Segment, SegmentKernel
from secateur.pruning.refit.target_layers import affine

Direction = list[tuple[Tensor, Tensor]]
"""For each kernel: a change of it, `[group, output, value]` (`in_patch_order`), and of its offset,
`[group, output]`."""
Seen = dict[Node, tuple[Tensor, Tensor]]
"""Input and output of layers, by node; the norm that alone reads an output is applied to it."""


class SegmentFunction:
    """The part of the cut network from a segment's first kernel to its targets.

    Batch norms behind its kernels are folded into them, which saves passes over the maps.
    """

    def __init__(self, segment: Segment, kept: KeptChannels, state: State) -> None:
        self._segment = segment
        self._nodes = [target.value_node for target in segment.targets]
        self._kernels = [_folded(kernel, kept, state) for kernel in segment.kernels]

    @property
    def scales(self) -> list[Float[Tensor, "group output"]]:
        """For each kernel what the norm behind it multiplies its outputs with."""
        return [kernel.scale for kernel in self._kernels]

    def __call__(
        self, start: GraphInterpreter, point: Direction, seen: Seen | None = None
    ) -> list[Tensor]:
        """Return the targets' values with other kernels and offsets, of all images of a batch.

        `start` is the cut network in front of the segment, and stays there. `seen` is filled with
        the inputs and outputs of the layers themselves.
        """

        def computed(kernel: _FoldedKernel, values: Tensor, offset: Tensor) -> Compute:
            def compute(lookup: Callable[[Node], Any]) -> Tensor:
                inputs = lookup(kernel.source)
                result = kernel.apply(inputs, *kernel.folded(values, offset))
                if seen is not None:
                    seen[kernel.node] = inputs, result
                return result

            return compute

        return self._run(start, point, computed)

    def changes(self, start: GraphInterpreter, seen: Seen, direction: Direction) -> list[Tensor]:
        """Return the Jacobian times a direction, at the point where the layers were `seen`."""

        def computed(kernel: _FoldedKernel, values: Tensor, offset: Tensor) -> Compute:
            def compute(lookup: Callable[[Node], Any]) -> Tensor:
                inputs, change = forward_ad.unpack_dual(lookup(kernel.source))
                moved = kernel.apply(inputs, *kernel.folded_change(values, offset))
                if change is not None:
                    moved = moved + kernel.apply(change, kernel.unchanged, None)
                return _dual(seen[kernel.node][1].detach(), moved)

            return compute

        with forward_ad.dual_level():
            pairs = map(forward_ad.unpack_dual, self._run(start, direction, computed))
            return [
                torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent
                for pair in pairs
            ]

    def _run(
        self,
        start: GraphInterpreter,
        point: Direction,
        computed: Callable[[_FoldedKernel, Tensor, Tensor], Compute],
    ) -> list[Tensor]:
        overrides: dict[Node, Compute] = {}
        for kernel, (values, offset) in zip(self._kernels, point, strict=True):
            overrides[kernel.node] = computed(kernel, values, offset)
            if kernel.norm is not None:
                overrides[kernel.norm] = _unchanged(kernel.node)
        values_of: dict[Node, Tensor] = {}
        cut = start.copy()
        after = {node: catch(values_of, node) for node in self._nodes}
        cut.advance(self._segment.last, after=after, overrides=overrides)
        return [values_of[node] for node in self._nodes]


@dataclass(frozen=True, eq=False)
class _FoldedKernel:
    """A layer that is computed with another kernel and an offset, and the norm behind it."""

    kernel: SegmentKernel
    current: Tensor
    """The kernel in the cut network."""
    scale: Float[Tensor, "group output"]
    shift: Float[Tensor, "group output"]
    """What the bias and the norm add."""
    sizes: Mapping[int, Any]

    @property
    def node(self) -> Node:
        """The operation."""
        return self.kernel.layer.node

    @property
    def source(self) -> Node:
        """The node that it reads."""
        return self.kernel.layer.source

    @property
    def norm(self) -> Node | None:
        """The norm that is folded in."""
        return self.kernel.norm

    @property
    def unchanged(self) -> Tensor:
        """The kernel of the cut network times the norm's scale."""
        shape = [-1] + [1] * (self.current.dim() - 1)
        return self.current * self.scale.to(self.current.dtype).view(shape)

    def folded(self, values: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return kernel and bias, with the norm in them."""
        kernel, bias = self.folded_change(values, offset)
        return kernel, bias + self.shift.flatten().to(bias)

    def folded_change(self, values: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the change of kernel and bias, from that before the norm."""
        kernel = self.kernel.shaped(values * self.scale[..., None], self.current)
        return kernel, (offset * self.scale).flatten().to(kernel)

    def apply(self, inputs: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        weight, source = self.node.args[1], self.source

        def lookup(node: Node) -> Tensor:
            assert node in (weight, source)
            return kernel if node is weight else inputs

        result: Tensor = apply(self.node, lookup, {**self.sizes, _BIAS: bias})
        return result


_BIAS = 2
"""Position of the bias among the arguments of convolutions and linear layers."""


def _folded(kernel: SegmentKernel, kept: KeptChannels, state: State) -> _FoldedKernel:
    layer = kernel.layer
    scale = torch.ones(kernel.rows.shape, device=state[layer.layer.weight].device)
    shift = torch.zeros_like(scale)
    if layer.bias is not None:
        shift = state[layer.bias].float().view_as(scale)
    if kernel.norm is not None:
        factor, summand = affine(kept.dependencies.graph, state, kernel.norm)
        scale = factor.float().view_as(scale)
        shift = shift * scale + summand.float().view_as(scale)
    sizes = kept.sizes.get(layer.node, {})
    return _FoldedKernel(kernel, state[layer.layer.weight], scale, shift, sizes)


def requiring_gradients(point: Direction) -> Direction:
    """Return kernels and offsets that gradients are computed for."""
    return [(k.detach().requires_grad_(), o.detach().requires_grad_()) for k, o in point]


def gradients(outputs: Sequence[Tensor], point: Direction, errors: Sequence[Tensor]) -> Direction:
    """Return the transposed Jacobian times errors of the outputs, which can be used again."""
    flat = [part for pair in point for part in pair]
    parts = torch.autograd.grad(outputs, flat, list(errors), retain_graph=True)
    return [(parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]


def catch(values: dict[Node, Tensor], node: Node) -> NodeHook:
    """Return a hook that keeps the value of a node."""

    def keep(value: Tensor) -> None:
        values[node] = value

    return keep


def _unchanged(node: Node) -> Compute:
    def compute(lookup: Callable[[Node], Any]) -> Any:
        return lookup(node)

    return compute


def _dual(value: Tensor, change: Tensor) -> Tensor:
    """Return a value that carries its change along."""
    with warnings.catch_warnings(action="ignore"):  # torch 2.14's code is deprecated in torch 2.14
        dual: Tensor = forward_ad.make_dual(value, change)
        return dual
