"""The thin seam to `torch.distributed`: without a process group everything is one process."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.runtime.watchdog import heartbeat

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it gives up. Where one of them has gone it does
not wait so long: see `heartbeat`."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within the block the processes that torchrun or accelerate launch has started are one group.

    Nothing is done where there is one process, or a group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():  # tallies are on the CPU, what is trained on the accelerator
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        with heartbeat(*share()):
            try:
                yield
            except SystemExit as end:  # how a command line ends, well or not
                if not end.code:
                    wait()
                raise
            wait()  # whoever goes first is not missed
    finally:
        dist.destroy_process_group()


def share() -> tuple[int, int]:
    """This process's number and how many there are: it takes every so manieth image."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return share()[0] == 0


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


def by_first(measure: Callable[[], T]) -> T:
    """What the first process measures while the others wait: times, which differ and disturb."""
    found: T = gathered(measure() if is_first() else None)[0]
    return found


def dealt(batches: Sequence[T]) -> Sequence[T]:
    """This process's share of a list: every so manieth; see `undealt`."""
    rank, size = share()
    return batches[rank::size]


def undealt(own: Sequence[T]) -> list[T]:
    """The whole list in its order, from the shares that `dealt` gave to each process."""
    shares = gathered(list(own))
    return [
        share[turn]
        for turn in range(max(map(len, shares)))
        for share in shares
        if turn < len(share)
    ]


def wait() -> None:
    """Returns when all processes have come here."""
    gathered(None)


def any_of(is_so: bool) -> bool:
    """Whether it is so in any process."""
    return any(gathered(is_so))


def fewest(count: int) -> int:
    """The smallest of the counts of all processes."""
    smallest: int = min(gathered(count))
    return smallest


def added_up(own: Iterable[float]) -> list[float]:
    """Numbers added up over all processes, in the order of the processes."""
    return [math.fsum(values) for values in zip(*gathered(list(own)), strict=True)]


def from_first(tensors: Iterable[Tensor]) -> None:
    """Puts what the first process has into the tensors of all, in place."""
    if share()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
