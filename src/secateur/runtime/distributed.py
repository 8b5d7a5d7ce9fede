"""Run one computation in several processes, on top of `torch.distributed`.

Every function works without a process group too: then there is one process, of rank 0. Ranks come
from the process group itself and not from the environment (as accelerate's `PartialState` takes
them), so a group that the caller's own launcher has set up counts as well. If a process dies, its
launcher (`torchrun`, `accelerate launch`) ends the others; processes that nobody ends fail at their
next exchange, at the latest after `TIMEOUT`.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the command line imports this module before it knows that it needs torch
    import torch

T = TypeVar("T")
TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others before it fails."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun or accelerate launch has started, for the length of a block.

    Does nothing if there is one process, or a process group already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    backend = "gloo"  # of what is on the CPU
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    elif torch.xpu.is_available() and dist.is_backend_available("xccl"):
        backend = "cpu:gloo,xpu:xccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """Return this process's number among those of its machine, as its launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes: (0, 1) without a process group."""
    dist = sys.modules.get("torch.distributed")  # a process group exists only if it was imported
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Return whether this is the process of rank 0, the only one that writes files and prints."""
    return rank_and_world_size()[0] == 0


def all_reduce_sum(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place.

    All processes must pass the same tensors in the same order. Sums of integers are exact, so they
    don't depend on how the images were sharded.
    """
    if rank_and_world_size()[1] > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_max(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its elementwise maximum over all processes, in place."""
    if rank_and_world_size()[1] > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank; they must be picklable."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def on_main_process(measure: Callable[[], T]) -> T:
    """Return what `measure` returns on the main process, on every process.

    For measurements of time, which would differ from process to process; the others wait meanwhile.
    """
    result: T = all_gather(measure() if is_main_process() else None)[0]
    return result


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's shard of a list: every n-th item, of n processes."""
    rank, world_size = rank_and_world_size()
    return items[rank::world_size]


def gather_shards(local_shard: Sequence[T]) -> list[T]:
    """Return the whole list in its original order; the inverse of `shard`."""
    shards = all_gather(list(local_shard))
    return [
        shard[position]
        for position in range(max(map(len, shards)))
        for shard in shards
        if position < len(shard)
    ]


def barrier() -> None:
    """Return when all processes have called this."""
    all_gather(None)


def any_process(condition: bool) -> bool:
    """Return whether the condition holds in any process."""
    return any(all_gather(condition))


def all_reduce_min(count: int) -> int:
    """Return the smallest of the counts of all processes."""
    smallest: int = min(all_gather(count))
    return smallest


def sum_over_processes(values: Iterable[float]) -> list[float]:
    """Return the sums of numbers over all processes, added in the order of the ranks."""
    return [math.fsum(numbers) for numbers in zip(*all_gather(list(values)), strict=True)]


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Copy the main process's tensors into those of all processes, in place."""
    if rank_and_world_size()[1] > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, 0)
