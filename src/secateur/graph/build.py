"""Reads the dependency graph of a network: traces it, follows its channels, and tries a cut."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from secateur.errors import UnknownName
from secateur.graph.channel_ids import ChannelPropagation, Rule
from secateur.graph.dependency import RESIDUAL, DependencyGraph
from secateur.graph.rules import RULES
from secateur.graph.sizes import resolve_sizes
from secateur.graph.torchvision_detectors import forward_of
from secateur.graph.trace import Forward, trace
from secateur.runtime.module_state import unwrapped


def build_dependency_graph(
    model: nn.Module,
    example: Tensor,
    *,
    prune_residual: bool = False,
    exclude: Iterable[str] = (),
    rules: Mapping[str, Rule] | None = None,
    forward: Forward | None = None,
) -> DependencyGraph:
    """The dependency graph of `model` for images like `example` `[image, rgb, height, width]`.

    Channels that residual sums tie over a whole stage are frozen unless `prune_residual`. `exclude`
    are name patterns, such as `layer1.*`, of layers whose filters must stay. `rules` are added to
    `rules.RULES`: name of an operation, `namespace::name` outside of ATen -> rule. With `forward`
    it is `forward(model, images)` that is traced, for networks whose whole answer can't be;
    torchvision's detectors are known (`detectors`). Of a compiled network the original is read.
    Raises `TraceError` where the network can't be traced, `UnknownName` where a pattern fits no
    layer and `UsageError` where a rule of one's own does not give ids for its operation's value.
    """
    model = unwrapped(model)
    forward = forward or forward_of(model)
    spread = ChannelPropagation(trace(model, example, forward), {**RULES, **(rules or {})})
    spread.visit_all()
    for output in spread.graph.outputs:
        spread.freeze(spread.axes[output], "written to the network's output")
    if not prune_residual:
        spread.freeze_residual_channels(RESIDUAL)
    _exclude(spread, tuple(exclude))
    return resolve_sizes(model, example, forward, spread)


def _exclude(spread: ChannelPropagation, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        chosen = [layer for layer in spread.layers if fnmatch.fnmatchcase(layer.name, pattern)]
        if not chosen:
            raise UnknownName("layer to exclude", pattern, {layer.name for layer in spread.layers})
        spread.freeze((layer.produced for layer in chosen), f"excluded by {pattern!r}")
