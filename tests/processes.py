"""Run functions in several processes at once, with and without a process group."""

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
    """Return a context whose processes start from one with all slow imports done."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(
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
    return forkserver


def started(function: Callable[..., Any], *arguments: object) -> BaseProcess:
    """Start a process that runs a function, and may start others."""
    process: BaseProcess = context().Process(target=function, args=arguments)  # type: ignore[attr-defined]
    process.start()
    return process


def side_by_side(function: Callable[..., Any], size: int, *arguments: object) -> None:
    """Run `function(number, *arguments)` in `size` processes at once, and wait for all."""
    context()
    start_processes(function, arguments, nprocs=size, start_method="forkserver")


def in_group(function: Callable[..., Any], size: int, *arguments: object) -> list[Any]:
    """Return what a function returns in each process of a gloo group of `size`, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        processes = [
            started(_member, function, rank, size, shared, arguments) for rank in range(size)
        ]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * size
        return [torch.load(shared / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _member(
    function: Callable[..., Any], rank: int, size: int, shared: Path, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    # torchrun sets these variables, and accelerate reads them.
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    sizes = {name: str(size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    os.environ.update(ranks | sizes | {"OMP_NUM_THREADS": "1"})
    address = f"file://{shared}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    try:
        torch.save(function(*arguments), shared / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
