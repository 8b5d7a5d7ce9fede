"""The raw maps of Ultralytics' networks: what their heads compute before they decode it.

In evaluation mode a network of Ultralytics returns decoded boxes together with the feature maps
that it made them from. None of the channels of these could ever be removed, and a head that works
without non-maximum suppression returns the boxes with the highest scores alone. So the network is
traced as far as its raw maps, as it returns them in training: boxes, class scores, mask
coefficients and prototypes, angles, key points; of both branches if the head has two. Layers that
run in training alone, such as the semantic head of a YOLO26 segmentation network, are among them
and lose the same channels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.graph.forward import forward_of
from secateur.graph.network_graph import Forward
from secateur.runtime.torch_internals import tree_leaves

_HEADS = ("Classify", "Detect", "SemanticSegment")
"""Heads whose outputs in training are raw maps; most others are subclasses of these."""
_FEATURES = "feats"
"""Name of the head's input among its raw maps."""
_TRAINING_PARTS = ("proto",)
"""Parts of a head that return more in training."""


def traceable_forward(model: nn.Module) -> Forward | None:
    """Return `raw_maps` for a network of Ultralytics with a known head; None for other networks.

    A network that runs through a function of the user's counts as another network.
    """
    tasks = sys.modules.get("ultralytics.nn.tasks")  # who has such a network has imported it
    if tasks is None or forward_of(model) is not None or not isinstance(model, tasks.BaseModel):
        return None
    heads = tuple(getattr(tasks, name) for name in _HEADS if hasattr(tasks, name))
    return raw_maps if isinstance(_head(model), heads) else None


def raw_maps(model: Any, images: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Return the raw maps of a network of Ultralytics: one tensor, or several in a tuple.

    For a classifier they are the logits `[image, class]`; for a detector boxes and class scores,
    each `[image, value, position]` with the positions of all levels in a row.
    """
    with _raw(_head(model)), _split_by_size(model):
        output = model.predict(images)
    maps = tuple(tree_leaves(_without_features(output)))
    return maps[0] if len(maps) == 1 else maps


def _head(model: Any) -> nn.Module:
    head: nn.Module = model.model[-1]
    return head


@contextmanager
def _raw(head: nn.Module) -> Iterator[None]:
    """Let a head return raw maps inside the block; its layers, such as batch norm, do not train."""
    parts = [head, *(getattr(head, name) for name in _TRAINING_PARTS if hasattr(head, name))]
    modes = [part.training for part in parts]
    for part in parts:
        part.training = True
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


@contextmanager
def _split_by_size(model: nn.Module) -> Iterator[None]:
    """Run modules as Ultralytics exports them, by `forward_split`, inside the block.

    That reads the number of channels from an attribute, which `forward` does not; so the attribute
    is found, and changes with a cut.
    """
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "forward_split")]
    forwards = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = module.forward_split
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _without_features(output: object) -> object:
    if not isinstance(output, Mapping):
        return output
    return {name: _without_features(part) for name, part in output.items() if name != _FEATURES}
