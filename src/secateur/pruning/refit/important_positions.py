"""Positions of a layer's output, drawn as often as the network's output depends on them.

Evenly spaced positions of a detector's feature maps are nearly all background, and a regression on
them fits what nobody looks at. The importance of a position is the squared gradient there of what
is compared of the output: the diagonal of the Gauss-Newton matrix of the comparison, summed over
channels. It is estimated by gradients of random combinations of the output's values (Hutchinson,
1990), or, where the output is logits, of the log-likelihood of labels drawn from the network's own
prediction (the Fisher information; Martens and Grosse, ICML 2015, section 2.1). No label is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.fx.node import Node

from secateur.config import RefitSection
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.network_graph import NetworkGraph, NodeHook
from secateur.graph.patches import first_places
from secateur.models.task import Reading, Task
from secateur.pruning.refit.layers import RefitLayer, refit_layer
from secateur.pruning.refit.regression_targets import State

EVEN_SHARE = 0.1
"""Importance of every position beside its own, as a multiple of an image's mean."""
IMAGES_AT_A_TIME = 4
"""The backward pass needs all activations of these."""


@dataclass(frozen=True, eq=False)
class PositionImportance:
    """Chooses the positions of every layer's output for some images."""

    graph: NetworkGraph
    state: State
    """Tensors of the original network."""
    layers: Sequence[RefitLayer]
    task: Task
    """What is compared of the output."""
    most: int
    """Maximum number of positions per image."""
    seed: int

    def positions(
        self, images: Float[Tensor, "image ..."], numbers: Int[Tensor, "image"]
    ) -> dict[Node, Int[Tensor, "row position"]]:
        """Return the positions by layer; an image may have several rows, such as a film's frames.

        They depend on an image and its number alone, up to rounding.
        """
        batches = (images.split(IMAGES_AT_A_TIME), numbers.split(IMAGES_AT_A_TIME))
        parts = [self._positions(*batch) for batch in zip(*batches, strict=True)]
        return {node: torch.cat([part[node] for part in parts]) for node in parts[0]}

    def _positions(self, images: Tensor, numbers: Tensor) -> dict[Node, Tensor]:
        outputs: dict[Node, Tensor] = {}

        def keep(node: Node) -> NodeHook:
            def hook(value: Tensor) -> None:
                # No gradient comes from behind a threshold or a `detach`, but it goes as far back.
                outputs[node] = value if value.requires_grad else value.requires_grad_()

            return hook

        with torch.inference_mode(mode=False), torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            interpreter = GraphInterpreter(self.graph, self.state, leaf)
            leaves = interpreter.finish(
                after={layer.node: keep(layer.node) for layer in self.layers}
            )
            output = tuple(leaves) if len(leaves) > 1 else leaves[0]
            total = _random_combination(
                self.task.read(output, len(images)), self.task, self._generators(numbers)
            )
            if not total.requires_grad:  # thresholds are all that the network returns
                return {}
            gradients = torch.autograd.grad(total, [*outputs.values()], allow_unused=True)
        gradient_of = dict(zip(outputs, gradients, strict=True))
        positions = {}
        for layer in self.layers:
            gradient = gradient_of[layer.node]
            if gradient is None:  # the output does not depend on it
                continue
            importance = layer.maps(gradient.float()).square().sum(1).cpu()
            importance = importance.nan_to_num(0.0, 0.0)  # as of a root at 0
            if importance.shape[1] == layer.positions:  # the cut removes none of them
                positions[layer.node] = _drawn(importance, numbers, self.most)
        return positions

    def _generators(self, numbers: Tensor) -> list[torch.Generator]:
        """Return a generator for each image, so that batches don't matter."""
        seeds = ((self.seed * 2**32 + number) % 2**63 for number in numbers.tolist())
        return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_importance(
    kept: KeptChannels, state: State, task: Task, settings: RefitSection, seed: int
) -> PositionImportance | None:
    """Return what chooses positions, from the original network's tensors; None for even spacing."""
    is_detector = task.kind == "detection"
    if settings.sampling == "even" or (settings.sampling == "auto" and not is_detector):
        return None
    graph = kept.dependencies.graph
    layers = [
        refit_layer(layer, kept)
        for layer in kept.dependencies.layers
        if layer.node.meta["val"].shape[0] % graph.images == 0  # others are not of images
    ]
    return PositionImportance(graph, state, layers, task, settings.positions, seed)


def _random_combination(
    reading: Reading, task: Task, generators: Sequence[torch.Generator]
) -> Float[Tensor, ""]:
    """Return the values with random signs, or the log-likelihood of drawn labels, summed."""
    noise = torch.stack([torch.rand(reading.shape[1:], generator=g) for g in generators])
    noise = noise.to(reading)
    if task.is_values:
        return (reading * (noise - 0.5).sign()).sum()
    likelihood = F.log_softmax(reading, dim=-1)
    tiny = torch.finfo(noise.dtype).tiny
    exponential = noise.clamp_min(tiny).log().neg().clamp_min(tiny)
    gumbel = exponential.log().neg()  # the Gumbel-max trick draws a label
    labels = (likelihood.detach() + gumbel).argmax(-1, keepdim=True)
    return likelihood.gather(-1, labels).sum()


def _drawn(
    importance: Float[Tensor, "row position"], numbers: Int[Tensor, "image"], most: int
) -> Int[Tensor, "row chosen"]:
    """Return positions at even steps of the summed importance, the first by the row's number."""
    rows = len(importance) // len(numbers)
    row_numbers = (numbers[:, None] * rows + torch.arange(rows)).flatten()
    total = importance.shape[1]
    mean = importance.double().mean(1, keepdim=True)
    shares = importance / mean.clamp_min(torch.finfo(mean.dtype).tiny) + EVEN_SHARE
    ends = shares.cumsum(1)
    count = min(most, total)
    steps = first_places(row_numbers)[:, None] + torch.arange(count)
    return torch.searchsorted(ends, steps.to(ends) / count * ends[:, -1:]).clamp(max=total - 1)
