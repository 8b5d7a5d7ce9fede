"""The head of a classifier: the layers that write the classes of the network's output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from secateur.graph.channel_ids import Ids
from secateur.graph.coupling import couple_channels
from secateur.graph.dependency import NOT_PRUNABLE, DependencyGraph
from secateur.graph.fixed_kernels import freeze_fixed_kernels
from secateur.graph.propagation import ChannelPropagation
from secateur.graph.rules import RULES
from secateur.graph.sizes import resolve_sizes
from secateur.graph.trace import trace
from secateur.runtime.errors import UsageError

CLASS_DIM = 1
"""Dimension of the output, `[image, class]` or `[image, class, height, width]`, with classes."""
NOT_HEAD = "not in the head"


@dataclass(frozen=True, eq=False)
class Head:
    """The head of a network, and which of its channels each class is."""

    dependencies: DependencyGraph
    """With the head's channels as the only group, whose name is that of the last layer."""
    group: str
    channel_of_class: Ids
    """`[class]`: number of the channel in the group."""


def find_head(model: nn.Module, images: Tensor) -> Head:
    """Return the head of a network that returns `[image, class, …]` for such `images`.

    Raises `TraceError` if the network can't be traced, and `UsageError` if its classes are not the
    filters of a layer that can be cut one by one.
    """
    propagation = ChannelPropagation(trace(model, images, RULES), RULES)
    propagation.visit_all()
    outputs = propagation.graph.outputs
    if len(outputs) != 1:
        raise _no_head(f"it returns {len(outputs)} tensors")
    axes = propagation.axes[outputs[0]]
    classes = axes[CLASS_DIM]
    if classes is None:
        raise _no_head("no linear layer or convolution writes its output's classes")
    propagation.freeze((ids for dim, ids in enumerate(axes) if dim != CLASS_DIM), NOT_HEAD)
    freeze_fixed_kernels(model, propagation)
    _freeze_all_but(propagation, classes)
    coupled = replace(couple_channels(model, propagation), needs_consumers=False)
    dependencies = resolve_sizes(coupled, images)
    channels = dependencies.channel_of[classes]
    if (channels == NOT_PRUNABLE).any() or len(dependencies.groups) != 1:
        reasons = [frozen.reason for frozen in dependencies.frozen if frozen.cause != NOT_HEAD]
        raise _no_head(next(iter(reasons), "its classes are filters of several layers"))
    [group] = dependencies.groups.values()
    if len(np.unique(channels)) < len(classes):
        raise _no_head("some of its classes come from the same filter")
    if group.consumers:
        raise _no_head(f"{group.consumers[0].node} computes something else from its classes")
    numbers = dependencies.index_table(group.channels)[channels]
    return Head(dependencies, group.name, numbers)


def _freeze_all_but(propagation: ChannelPropagation, classes: Ids) -> None:
    """Freeze the filters of all layers that don't write classes."""
    roots = propagation.roots()
    head = np.unique(roots[classes])
    others = (layer.produced for layer in propagation.layers if layer.produced is not None)
    propagation.freeze((ids for ids in others if not np.isin(roots[ids], head).any()), NOT_HEAD)


def _no_head(reason: str) -> UsageError:
    return UsageError(f"the network's head can't be cut to some classes: {reason}")
