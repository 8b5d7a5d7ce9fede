"""Branches on values of the images that a network makes by `torch.cond`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.runtime.torch_internals import tree_map


@contextmanager
def both_branches() -> Iterator[None]:
    """Inside the block, `torch.cond` computes both branches and chooses from their outputs.

    So channels can be followed through both, and the multiply-accumulates of both are counted.
    """
    original: Any = torch.cond
    torch.cond = _choose
    try:
        yield
    finally:
        torch.cond = original


def _choose(
    pred: bool | int | float | Tensor,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: tuple[Any, ...] | list[Any] = (),
) -> Any:
    """Return what `torch.cond` returns with these arguments, by `torch.where`."""
    if not isinstance(pred, Tensor):
        return (true_fn if pred else false_fn)(*operands)
    return tree_map(partial(torch.where, pred), true_fn(*operands), false_fn(*operands))
