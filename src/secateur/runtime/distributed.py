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

from secateur.runtime.watchdog import watchdog

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
        with watchdog(*rank_and_world_size()):
            try:
                yield
            except SystemExit as end:  # how a command line ends, well or not
                if not end.code:
                    barrier()
                raise
            barrier()  # whoever goes first is not missed
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are: it takes every n-th image."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank_and_world_size()[0] == 0


def all_reduce_sum(tallies: Iterable[Tensor]) -> None:
    """Adds each tensor up over all processes, in place; all must bring the same ones in order.

    Integer sums are the same to the last bit however the images were spread.
    """
    if rank_and_world_size()[1] > 1:
        for tally in tallies:
            dist.all_reduce(tally)


def all_reduce_max(tensors: Iterable[Tensor]) -> None:
    """Puts the largest value over all processes into each place of each tensor."""
    if rank_and_world_size()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def all_gather(own: Any) -> list[Any]:
    """What each process brings, in the order of their numbers."""
    _, size = rank_and_world_size()
    if size == 1:
        return [own]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, own)
    return found


def on_main_process(measure: Callable[[], T]) -> T:
    """What the first process measures while the others wait: times, which differ and disturb."""
    found: T = all_gather(measure() if is_main_process() else None)[0]
    return found


def shard(batches: Sequence[T]) -> Sequence[T]:
    """This process's share of a list: every n-th; see `undealt`."""
    rank, size = rank_and_world_size()
    return batches[rank::size]


def gather_shards(own: Sequence[T]) -> list[T]:
    """The whole list in its order, from the shares that `dealt` gave to each process."""
    shares = all_gather(list(own))
    return [
        share[turn]
        for turn in range(max(map(len, shares)))
        for share in shares
        if turn < len(share)
    ]


def barrier() -> None:
    """Returns when all processes have come here."""
    all_gather(None)


def any_process(is_so: bool) -> bool:
    """Whether it is so in any process."""
    return any(all_gather(is_so))


def all_reduce_min(count: int) -> int:
    """The smallest of the counts of all processes."""
    smallest: int = min(all_gather(count))
    return smallest


def sum_over_processes(own: Iterable[float]) -> list[float]:
    """Numbers added up over all processes, in the order of the processes."""
    return [math.fsum(values) for values in zip(*all_gather(list(own)), strict=True)]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Puts what the first process has into the tensors of all, in place."""
    if rank_and_world_size()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
