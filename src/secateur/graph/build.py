"""Builds the dependency graph: traces the network, propagates channel ids, verifies test cuts."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from secateur.graph import torchvision_detectors, ultralytics_networks
from secateur.graph.coupling import couple_channels
from secateur.graph.dependency import OUTPUT, RESIDUAL, DependencyGraph
from secateur.graph.fixed_kernels import freeze_fixed_kernels
from secateur.graph.forward import with_forward, with_inputs
from secateur.graph.module_state import as_input
from secateur.graph.network_graph import Forward
from secateur.graph.propagation import ChannelPropagation, Rule
from secateur.graph.rules import RULES
from secateur.graph.sizes import resolve_sizes
from secateur.graph.trace import trace
from secateur.graph.wrappers import unwrapped
from secateur.runtime.errors import UnknownName
from secateur.runtime.packed_inputs import parameters_of, read_inputs


def build_dependency_graph(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    *,
    prune_residual: bool = False,
    exclude: Iterable[str] = (),
    rules: Mapping[str, Rule] | None = None,
    forward: Forward | None = None,
) -> DependencyGraph:
    """Return the dependency graph of `model` for images like `example` `[image, channel, …]`.

    Channels that are coupled by skip connections over a whole stage are frozen unless
    `prune_residual`. `exclude` are name patterns, such as `layer1.*`, of layers whose filters must
    stay. `rules` are added to `rules.RULES`: name of an operation (`namespace::name` outside of
    ATen) -> rule. With `forward`, `forward(model, images)` is traced, for networks whose whole
    output can't be; torchvision's detectors and Ultralytics' networks have one (see
    `traceable_forward`). A network that is
    compiled or wrapped in `DataParallel` is taken out first (`wrappers.unwrapped`), and layers have
    the names that they have there. Of `example` only the shape matters; for a network that takes
    several inputs it is a tuple of them, or a dict if they have names.

    Raises `TraceError` if the network can't be traced, `UnknownName` if a pattern matches no layer,
    and `UsageError` if `model` is no network, if `example` is no batch for it, or if one of `rules`
    does not return ids for its operation's value.
    """
    model = unwrapped(model)
    packed, inputs = read_inputs(example, parameters_of(model, forward))
    packed = as_input(model, packed)
    model = with_inputs(with_forward(model, forward or traceable_forward(model)), inputs)
    rules = {**RULES, **(rules or {})}
    propagation = ChannelPropagation(trace(model, packed, rules), rules)
    propagation.visit_all()
    for output in propagation.graph.outputs:
        propagation.freeze(propagation.axes[output], OUTPUT)
    freeze_fixed_kernels(model, propagation)
    if not prune_residual:
        propagation.freeze_residual_channels(RESIDUAL)
    _exclude(propagation, tuple(exclude))
    return resolve_sizes(couple_channels(model, propagation), packed)


def traceable_forward(model: nn.Module) -> Forward | None:
    """Return the traceable part of a network of torchvision or Ultralytics; None for others."""
    return torchvision_detectors.traceable_forward(model) or ultralytics_networks.traceable_forward(
        model
    )


def _exclude(propagation: ChannelPropagation, patterns: tuple[str, ...]) -> None:
    """Freeze the filters of layers that match a pattern."""
    for pattern in patterns:
        excluded = [
            layer for layer in propagation.layers if fnmatch.fnmatchcase(layer.name, pattern)
        ]
        if not excluded:
            raise UnknownName(
                "layer to exclude", pattern, {layer.name for layer in propagation.layers}
            )
        propagation.freeze((layer.produced for layer in excluded), f"excluded by {pattern!r}")
