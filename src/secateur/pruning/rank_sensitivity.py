"""How much the network's output changes when the rank of a convolution's kernel is reduced.

As for channels (`sensitivity`), it is the product of two factors: an error curve, which follows
from the second moments of the layer's inputs (`low_rank`), and a gain, which is measured on
calibration images, with the layer's kernel replaced by some of lower rank. The kernels of lower
rank come from one part of the images, and both factors are measured on the other one. On the same
images a layer in front of a global pooling seems to need no more directions than there are images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx.node import Node

from secateur.data import Batch
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import FactorableLayer
from secateur.graph.interpreter import GraphInterpreter, PartialPass, apply, partial_pass
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import Tensors
from secateur.graph.patches import PositionSampling
from secateur.models.divergence import output_error
from secateur.models.task import Task
from secateur.pruning.low_rank import LowRank
from secateur.pruning.outcome import Sensitivity
from secateur.pruning.refit.layers import RefitLayer, refit_layer
from secateur.pruning.refit.least_squares import Products
from secateur.pruning.refit.rows import from_patch_order, in_patch_order
from secateur.pruning.refit.target_layers import affine, target_layer
from secateur.pruning.sensitivity import (
    FEWEST_IMAGES,
    FEWEST_WITH_OBJECTS,
    MOST_IMAGES,
    Measurement,
    PlainPass,
    error_gains,
    image_count,
    passes_behind,
)
from secateur.runtime import distributed
from secateur.runtime.device import full_float32, sums_device
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.scoring.batching import first_images, images_at_a_time

SNAPSHOTS = (7 / 8, 3 / 4, 1 / 2, 1 / 4)
"""Fractions of the whole rank that the gain is measured at; an image takes one of them."""
ROWS_PER_VALUE = 4
"""Positions that moments are taken from, for each value of a patch…"""
FEWEST_ROWS = 8192
"""…but at least so many, where the maps have them."""


@full_float32()
def measure_rank_sensitivity(
    state: Tensors,
    dependencies: DependencyGraph,
    layers: Mapping[str, FactorableLayer],
    batches: Iterable[Batch],
    *,
    most_images: int = MOST_IMAGES,
    task: Task | None = None,
    memory_bytes: float = math.inf,
    progress: ProgressCallback = no_progress,
) -> Sensitivity:
    """Return `{name: output error when the rank is less than the whole rank by 0, 1, …}`.

    All processes pass batches that begin with the same images. Moments of several layers are taken
    in one pass, as far as `memory_bytes` allow. For `task` see `output_error`.
    """
    if not layers:
        return {}
    parts = {
        name: partial_pass(dependencies.graph, [layer.layer.node]) for name, layer in layers.items()
    }
    has_objects = task is not None and any(part.times is not None for part in task.parts)
    fewest = FEWEST_WITH_OBJECTS if has_objects else FEWEST_IMAGES
    passes = passes_behind(dependencies, parts.values())
    count = partial(image_count, passes=passes, fewest=fewest, most=most_images)
    images = first_images(batches, lambda shape: 2 * count(shape))
    sample, others = images.tensor_split([-(-len(images) // 2)])
    curves: dict[str, list[float]] = {}
    measurements = {}
    for chunk in _chunks(layers, memory_bytes):
        fitted = _moments(state, dependencies, chunk, others if len(others) else sample)
        measured = _moments(state, dependencies, chunk, sample)
        for name, layer in chunk.items():
            low_rank = _low_rank(state, dependencies, layer, fitted.pop(name)[1])
            mean, products = measured.pop(name)
            curves[name] = low_rank.curve(layer.whole_rank, products)
            measurements[name] = _RankMeasurement(
                layer, parts[name], low_rank, mean, curves[name], state, task
            )
    mine = distributed.shard(list(measurements.values()))
    gains = error_gains(dependencies.graph, state, sample, mine, progress)
    gain_of = dict(zip(measurements, gains, strict=True))
    return {name: [gain_of[name] * error for error in curve] for name, curve in curves.items()}


def _chunks(
    layers: Mapping[str, FactorableLayer], memory_bytes: float
) -> Iterator[dict[str, FactorableLayer]]:
    """Yield the layers in parts whose moments fit into half of the memory, at least one each."""
    chunk: dict[str, FactorableLayer] = {}
    used = 0
    for name, layer in layers.items():
        size = 2 * 8 * math.prod(layer.layer.shape[1:]) ** 2
        if chunk and used + size > memory_bytes / 2:
            yield chunk
            chunk, used = {}, 0
        chunk[name] = layer
        used += size
    yield chunk


def _moments(
    state: Tensors,
    dependencies: DependencyGraph,
    layers: Mapping[str, FactorableLayer],
    sample: Float[Tensor, "image ..."],
) -> dict[str, tuple[Float[Tensor, "value"], Float[Tensor, "value value"]]]:
    """Return mean and covariance of the patches that each layer reads."""
    whole = KeptChannels(dependencies, {})
    device = sums_device(sample.device)
    products = {}
    overrides = {}
    start = 0

    def numbers(images: int) -> Tensor:
        return torch.arange(start, start + images)

    for name, layer in layers.items():
        place, values = refit_layer(layer.layer, whole), math.prod(layer.layer.shape[1:])
        products[name] = Products(1, values, values, device, is_square=True)
        rows = max(FEWEST_ROWS, ROWS_PER_VALUE * values)
        overrides[layer.layer.node] = _adding(
            place, products[name], -(-rows // len(sample)), numbers
        )
    last = max(overrides, key=list(dependencies.graph.nodes).index)
    with torch.inference_mode():
        for images in sample.split(images_at_a_time(*sample.shape[2:])):
            interpreter = GraphInterpreter(dependencies.graph, state, images)
            behind = dependencies.graph.nodes[dependencies.graph.nodes.index(last) + 1 :]
            interpreter.advance(behind[0] if behind else None, overrides=overrides)
            start += len(images)
    result = {}
    for name, sums in products.items():
        mean, _, moments = sums.means()
        result[name] = mean[0], moments[0].addr(mean[0], mean[0], alpha=-1)
    return result


def _adding(
    layer: RefitLayer, products: Products, positions: int, numbers: Callable[[int], Tensor]
) -> Callable[[Callable[[Node], Any]], Any]:
    """Return a layer's operation, which also adds the patches that it reads to `products`."""

    def compute(lookup: Callable[[Node], Any]) -> Any:
        inputs = lookup(layer.source)
        images = torch.arange(len(inputs))
        chosen = PositionSampling(numbers(len(inputs)), positions, 0.5).over(layer.positions)
        rows = layer.patches(inputs, chosen, images).float().to(products.device)
        products.add(rows, rows)
        return apply(layer.node, lookup, {})

    return compute


def _low_rank(
    state: Tensors,
    dependencies: DependencyGraph,
    layer: FactorableLayer,
    moments: Float[Tensor, "value value"],
) -> LowRank:
    kernel = state[layer.layer.weight]
    norm = target_layer(refit_layer(layer.layer, KeptChannels(dependencies, {}))).norm
    scale = torch.ones(len(kernel))
    if norm is not None:
        scale, _ = affine(dependencies.graph, state, norm)
    rows = in_patch_order(kernel)[0].to(moments.device)
    return LowRank(rows, moments, kernel.shape, scale.to(moments.device))


class _RankMeasurement(Measurement):
    """The errors of a layer and of the output, for some ranks."""

    def __init__(
        self,
        layer: FactorableLayer,
        part: PartialPass,
        low_rank: LowRank,
        mean: Float[Tensor, "value"],
        curve: Sequence[float],
        state: Tensors,
        task: Task | None,
    ) -> None:
        self.part = part
        self._layer, self._task = layer.layer, task
        whole, kernel = layer.whole_rank, state[layer.layer.weight]
        ranks = [max(1, min(whole - 1, round(fraction * whole))) for fraction in SNAPSHOTS]
        self._curve = [curve[whole - rank] for rank in ranks]
        self.errors = torch.zeros(len(ranks), 2, dtype=torch.float64)
        old = in_patch_order(kernel)[0].to(mean)
        self._kernels, self._shifts = [], []
        for rank in ranks:
            nearest = low_rank.nearest(rank)
            self._kernels.append(from_patch_order(nearest[None], kernel.shape).to(kernel))
            self._shifts.append(((old - nearest) @ mean).to(kernel)[:, None, None])

    def add(self, plain: PlainPass) -> None:
        """Measure the errors on a batch with the rank that it takes."""
        number = plain.snapshot % len(self._kernels)
        plain.interpreter.advance(self.part.first)
        overrides = {self._layer.node: self._with(number)}
        outputs = plain.interpreter.rerun(self.part, plain.unchanged, overrides)
        error = output_error(plain.outputs, outputs, self._task)
        self.errors[number] += plain.images * torch.tensor([error, self._curve[number]])

    def _with(self, number: int) -> Callable[[Callable[[Node], Any]], Any]:
        """Return the layer's operation with a kernel of lower rank, and the same mean output."""

        def compute(lookup: Callable[[Node], Any]) -> Any:
            def replaced(node: Node) -> Any:
                return self._kernels[number] if node is self._layer.kernel_node else lookup(node)

            return apply(self._layer.node, replaced, {}) + self._shifts[number]

        return compute
