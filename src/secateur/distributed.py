"""The thin seam to `torch.distributed`: without a process group everything is one process."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def share() -> tuple[int, int]:
    """This process's number and how many there are: it takes every so manieth image."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(tallies: Iterable[Tensor]) -> None:
    """Adds each tensor up over all processes, in place; all must bring the same ones in order.

    Integer sums are the same to the last bit however the images were spread.
    """
    if share()[1] > 1:
        for tally in tallies:
            dist.all_reduce(tally)


def largest(tensors: Iterable[Tensor]) -> None:
    """Puts the largest value over all processes into each place of each tensor."""
    if share()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def gathered(own: Any) -> list[Any]:
    """What each process brings, in the order of their numbers."""
    _, size = share()
    if size == 1:
        return [own]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, own)
    return found


def any_of(is_so: bool) -> bool:
    """Whether it is so in any process."""
    return any(gathered(is_so))


def added_up(own: Iterable[float]) -> list[float]:
    """Numbers added up over all processes, in the order of the processes."""
    return [math.fsum(values) for values in zip(*gathered(list(own)), strict=True)]


def from_first(tensors: Iterable[Tensor]) -> None:
    """Puts what the first process has into the tensors of all, in place."""
    if share()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
