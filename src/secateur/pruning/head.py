"""Cuts the head of a network, such that its outputs are those of some classes only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from secateur.config import Budget
from secateur.graph.cut import cut
from secateur.graph.dependency import Removed
from secateur.graph.head import CLASS_DIM, Head, find_head
from secateur.graph.module_state import as_input, evaluating
from secateur.models.divergence import relative_error
from secateur.pruning.equivalence import TOLERANCE, masked_network
from secateur.pruning.plan import PruningPlan
from secateur.runtime.device import full_float32
from secateur.runtime.errors import CutError, UsageError


@full_float32()
def keep_classes(model: nn.Module, images: Tensor, classes: Sequence[int]) -> nn.Module:
    """Return a copy of `model` with the outputs of these classes only, compared with `model`.

    The outputs of `model` for such `images` are `[image, class, …]`; `classes` ascend, and the copy
    has its outputs in this order. On the images its logits are those of `model` for these classes;
    where `model` ends in a softmax, the copy's is over these classes. Raises what `cut_head`
    raises, and `CutError` if the outputs differ.
    """
    images = as_input(model, images)
    head = find_head(model, images)
    removed = _removed(head, classes)
    smaller = cut(model, head.dependencies, removed)
    plan = PruningPlan(removed, Budget("filters", 1.0), "classes")
    with torch.inference_mode(), evaluating(smaller):
        whole = masked_network(model, head.dependencies, plan)(images)
        assert isinstance(whole, Tensor)
        expected = whole.index_select(CLASS_DIM, torch.tensor(classes, device=whole.device))
        error = relative_error(smaller(images), expected)
    if not error <= TOLERANCE:
        raise CutError(
            "with its head cut to some classes the network computes other logits for them "
            f"(relative error {error:.1e}): leave --keep-classes out"
        )
    return smaller


def cut_head(model: nn.Module, images: Tensor, classes: Sequence[int]) -> nn.Module:
    """Return a copy of `model` with the outputs of these classes only; see `keep_classes`.

    Of the images only the shape matters. Raises `TraceError`, and `UsageError` if the head can't be
    cut, or has no such classes.
    """
    head = find_head(model, as_input(model, images))
    return cut(model, head.dependencies, _removed(head, classes))


def _removed(head: Head, classes: Sequence[int]) -> Removed:
    """Return the channels of the head that are none of the classes."""
    of = len(head.channel_of_class)
    if not classes or max(classes) >= of:
        raise UsageError(f"the network's head has {of} classes, 0 to {of - 1}, not {max(classes)}")
    is_removed = np.ones(of, dtype=bool)
    is_removed[list(classes)] = False
    return {head.group: tuple(sorted(head.channel_of_class[is_removed].tolist()))}
