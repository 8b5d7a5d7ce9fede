"""Low rank: a convolution replaced by two thinner ones, one after the other.

The kernel `[output, input, height, width]` becomes a matrix of rank r, and the matrix a product of
two:

- `spatial`, for kernels with a height and a width: rows are (input, height), columns (width,
  output). A vertical convolution to r channels comes first, then a horizontal one (Jaderberg et
  al., *Speeding up Convolutional Neural Networks with Low Rank Expansions*, BMVC 2014).
- `channel`, for all others: rows are (input, height, width), columns outputs. A convolution to r
  channels comes first, then one of size 1 (Zhang et al., *Accelerating Very Deep Convolutional
  Networks*, TPAMI 2016).

The two are an `nn.Sequential` of `nn.Conv2d` in the place of the convolution, so the network needs
no code of secateur.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.fx.node import Node

from secateur.graph.channel_ids import Layer
from secateur.graph.dependency import DependencyGraph, aliases_of
from secateur.graph.module_state import owner_of, tensors_of
from secateur.runtime.device import sums_device

Form = Literal["spatial", "channel"]
Ranks = Mapping[str, int]
"""Name of a convolution -> rank of its kernel, which is the number of channels in between."""
Matrix = Float[Tensor, "left right"]
"""A kernel as the matrix whose rank counts."""


@dataclass(frozen=True, eq=False)
class FactorableLayer:
    """A convolution that can be replaced by two."""

    layer: Layer
    form: Form
    first_positions: int
    """Positions per image of the first of the two; the second has those of the layer."""

    def first_values(self, inputs: int) -> int:
        """Return the number of weights that a channel in between takes in the first of the two."""
        _, _, height, width = self.layer.shape
        return inputs * height * (1 if self.form == "spatial" else width)

    def second_values(self, outputs: int) -> int:
        """Return the number of weights that a channel in between takes in the second of the two."""
        return outputs * (self.layer.shape[3] if self.form == "spatial" else 1)

    @property
    def whole_rank(self) -> int:
        """The largest rank with fewer multiply-accumulates or parameters, plus one."""
        outputs, inputs, *_ = self.layer.shape
        weights = math.prod(self.layer.shape)
        first, second = self.first_values(inputs), self.second_values(outputs)
        macs = weights * self.layer.positions
        a_rank = first * self.first_positions + second * self.layer.positions
        by_cost = max(-(-macs // a_rank), -(-weights // (first + second)))
        return min(by_cost, first + 1, second + 1)


def form_of(shape: Sequence[int]) -> Form:
    """Return how a kernel of a shape is replaced."""
    return "spatial" if min(shape[2:]) > 1 else "channel"


def factorable_layers(
    model: nn.Module, dependencies: DependencyGraph, exclude: Sequence[str] = ()
) -> dict[str, FactorableLayer]:
    """Return the convolutions that can be replaced by two, by name, in the order of execution.

    These are `nn.Conv2d` without groups that run once, by a call of the module, and share their
    kernel with nothing else. Those whose name matches a pattern in `exclude` are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    aliases = aliases_of(model)
    uses: dict[str, list[Layer]] = {}
    for layer in dependencies.layers:
        uses.setdefault(layer.weight, []).append(layer)
    result = {}
    for weight, layers in uses.items():
        name, layer = owner_of(weight), layers[0]
        module = modules.get(name)
        is_plain = type(module) is nn.Conv2d and module.groups == 1
        if not is_plain or weight != f"{name}.weight" or len(aliases[weight]) > 1:
            continue
        assert isinstance(module, nn.Conv2d)
        is_called = len(layers) == 1 and _calling_module(layer.node) == name
        is_apart = not layer.is_computed and list(layer.kernel_node.users) == [layer.node]
        is_excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
        if module.padding_mode != "zeros" or layer.position_channels or is_excluded:
            continue
        if is_called and is_apart:
            form = form_of(layer.shape)
            result[name] = FactorableLayer(layer, form, _first_positions(layer, form))
    return {name: layer for name, layer in result.items() if layer.whole_rank > 1}


def _calling_module(node: Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1] if stack else ""


def _first_positions(layer: Layer, form: Form) -> int:
    """Return the positions per image of a vertical convolution, which keeps the input's width."""
    source = layer.node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"].shape, layer.node.meta["val"].shape
    if form == "channel" or not after[3]:
        return layer.positions
    # The input's width, as far as the padding of the width does not matter.
    return int(layer.positions // after[3] * before[3])


def matrix_of(kernel: Float[Tensor, "output input height width"]) -> Matrix:
    """Return the matrix whose rank counts."""
    outputs, inputs, height, width = kernel.shape
    ordered = kernel.permute(1, 2, 3, 0)
    if form_of(kernel.shape) == "spatial":
        return ordered.reshape(inputs * height, width * outputs)
    return ordered.reshape(inputs * height * width, outputs)


def factorise(
    kernel: Float[Tensor, "output input height width"], rank: int
) -> tuple[Float[Tensor, "rank input _ _"], Float[Tensor, "output rank _ _"]]:
    """Return the two kernels whose product is the nearest of a rank, in the kernel's dtype.

    Both have the same share of the singular values.
    """
    outputs, inputs, height, width = kernel.shape
    matrix = matrix_of(kernel).to(sums_device(kernel.device)).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    first, second = (left[:, :rank] * roots).mT, roots[:, None] * right[:rank]
    if form_of(kernel.shape) == "spatial":
        first = first.reshape(rank, inputs, height, 1)
        second = second.reshape(rank, 1, width, outputs)
    else:
        first = first.reshape(rank, inputs, height, width)
        second = second.reshape(rank, 1, 1, outputs)
    second = second.permute(3, 0, 1, 2)
    first, second = (part.to(kernel.dtype).contiguous() for part in (first, second))
    return first.to(kernel.device), second.to(kernel.device)


def product(
    first: Float[Tensor, "rank input _ _"], second: Float[Tensor, "output rank _ _"]
) -> Float[Tensor, "output input height width"]:
    """Return the kernel that two kernels of `factorise` stand for, in their dtype."""
    height, device = first.shape[2] * second.shape[2], sums_device(first.device)
    left, right = (part.to(device).double() for part in (first, second))
    kernel = torch.einsum("rihv,orgw->oihgvw", left, right)
    result = kernel.reshape(len(second), first.shape[1], height, -1)
    return result.to(first.dtype).to(first.device)


def replace_by_factors(model: nn.Module, ranks: Ranks) -> None:
    """Replace convolutions of a network by two each, whose kernels are the nearest of the rank."""
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        factors = _factors(layer, rank)
        parents = [
            (parent, child_name)
            for parent in model.modules()
            for child_name, child in parent.named_children()
            if child is layer
        ]
        for parent, child_name in parents:
            setattr(parent, child_name, factors)


def _factors(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    edges = layer.padding if isinstance(layer.padding, tuple) else (0, 0)
    # Size, stride, dilation and padding along each dimension, and those of a size of 1.
    vertical, horizontal = zip(layer.kernel_size, layer.stride, layer.dilation, edges, strict=True)
    nothing = (1, 1, 1, 0)
    if form_of(layer.weight.shape) == "spatial":
        parts = [(vertical, nothing), (nothing, horizontal)]
    else:
        parts = [(vertical, horizontal), (nothing, nothing)]
    channels = [(layer.in_channels, rank), (rank, layer.out_channels)]
    kernels = factorise(layer.weight.detach(), rank)
    factors = []
    for number, (kernel, dims, (inputs, outputs)) in enumerate(
        zip(kernels, parts, channels, strict=True)
    ):
        size, stride, dilation, edge = ((dims[0][i], dims[1][i]) for i in range(4))
        padding = layer.padding if isinstance(layer.padding, str) else edge
        has_bias = number == 1 and layer.bias is not None
        arguments: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        part = nn.Conv2d(inputs, outputs, size, bias=has_bias, **arguments)
        part.weight = nn.Parameter(kernel, requires_grad=layer.weight.requires_grad)
        factors.append(part)
    if layer.bias is not None:
        bias = layer.bias.detach().clone()
        factors[1].bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return nn.Sequential(*factors).train(layer.training)


def tensors_with_products(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return `tensors_of` with each replaced convolution's kernel and bias under their old names.

    `model` is what `replace_by_factors` left. The kernels are products of the two kernels.
    """
    tensors = tensors_of(model)
    for name in ranks:
        first, second = tensors.pop(f"{name}.0.weight"), tensors.pop(f"{name}.1.weight")
        tensors[f"{name}.weight"] = product(first, second)
        bias = tensors.pop(f"{name}.1.bias", None)
        if bias is not None:
            tensors[f"{name}.bias"] = bias
    return tensors


def write_products(model: nn.Module, ranks: Ranks, tensors: Mapping[str, Tensor]) -> None:
    """Write kernels of these ranks, by their old names, into the two convolutions of each."""
    with torch.no_grad():
        for name, rank in ranks.items():
            parts = tensors_of(model.get_submodule(name))
            kernels = factorise(tensors[f"{name}.weight"], rank)
            for number, kernel in enumerate(kernels):
                parts[f"{number}.weight"].copy_(kernel)
            if "1.bias" in parts:
                parts["1.bias"].copy_(tensors[f"{name}.bias"])


def shapes_of_factors(model: nn.Module, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the two kernels in the place of a convolution."""
    first, second = (model.get_parameter(f"{name}.{part}.weight").shape for part in (0, 1))
    return tuple(first), tuple(second)
