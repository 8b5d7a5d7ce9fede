"""Runs functions in several processes at once, with and without a process group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def context() -> BaseContext:
    """Starts processes from a clean one that has imported what takes time to import."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        [
            *(
                "secateur.api",
                "secateur.experiments.compare.runner",
                "secateur.experiments.report.run_charts",
                "accelerate",
                "sklearn.datasets",
            ),
            *("torch.utils.flop_counter", "hypothesis", "pytest"),
        ]
    )
    return found


def started(function: Callable[..., Any], *arguments: object) -> BaseProcess:
    """A process that runs a function and may start others."""
    process: BaseProcess = context().Process(target=function, args=arguments)  # type: ignore[attr-defined]
    process.start()
    return process


def side_by_side(function: Callable[..., Any], size: int, *arguments: object) -> None:
    """Runs `function(number, *arguments)` in so many processes at once, until all have ended."""
    context()
    start_processes(function, arguments, nprocs=size, start_method="forkserver")


def in_group(function: Callable[..., Any], size: int, *arguments: object) -> list[Any]:
    """What each of `size` processes of one gloo group returns, in the order of their ranks."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        processes = [
            started(_member, function, rank, size, place, arguments) for rank in range(size)
        ]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * size
        return [torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _member(
    function: Callable[..., Any], rank: int, size: int, place: Path, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    # What torchrun tells its processes, and accelerate reads.
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    sizes = {name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ.update(ranks | sizes | {"OMP_NUM_THREADS": "1"})
    address = f"file://{place}/meeting"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        torch.save(function(*arguments), place / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
