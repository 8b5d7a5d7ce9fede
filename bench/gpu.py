"""Prune ResNet-50 on the accelerator, and the same on the CPU beside it.

    python bench/gpu.py [--images 256] [--network resnet50] [--cpu-threads N]

From the scores to the refit, by the defaults of `secateur.prune`: 256 images of 224², half of the
MACs. Each device prunes once, after one forward pass that wakes it up. The rows, one a device, are
in `results/gpu.json`: seconds of each stage and of everything, of a plain forward pass of the same
images, the most memory that tensors took on the device, and how far its plan is from the CPU's.
It ends with one line where torch finds no accelerator.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from rows import ROOT, Row, put_row, revision, surroundings
from secateur.graph.module_state import device_of
from secateur.runtime.device import CPU, accelerator_name, find_device, synchronize
from secateur.runtime.errors import UsageError
from whole_run_case import BATCH, FRACTION_LEFT, SEED, make_case

RESULTS = ROOT / "results" / "gpu.json"


def measure(model: nn.Module, images: Tensor) -> tuple[Row, secateur.PruneResult]:
    """Prune a network on its device; return times in seconds, memory in MiB, and the result."""
    device = device_of(model)
    _forward(model, images[:BATCH])  # wakes the device up
    forward = _seconds(lambda: _forward(model, images))
    module: Any = torch.get_device_module(device)
    has_peak = hasattr(module, "reset_peak_memory_stats")
    if has_peak:
        module.reset_peak_memory_stats(device)
    results: list[secateur.PruneResult] = []
    seconds = _seconds(
        lambda: results.append(secateur.prune(model, images, target=f"macs={FRACTION_LEFT}"))
    )
    (result,) = results
    row: Row = {
        "forward_seconds": round(forward, 3),
        "seconds": round(seconds, 2),
        "stage_seconds": {stage.stage: round(stage.seconds, 2) for stage in result.result.stages},
        "peak_memory_mib": module.max_memory_allocated(device) // 2**20 if has_peak else None,
        "agreement": result.scores["refit"].metric,
        "macs_left": result.scores["refit"].macs / result.scores["before"].macs,
    }
    return row, result


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        for batch in images.split(BATCH):
            model(batch.to(device_of(model)))


def _seconds(action: Any) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def common_fraction(one: secateur.PruneResult, other: secateur.PruneResult) -> float:
    """Return the fraction of the removed filters that both plans remove."""
    first, second = (
        {(name, number) for name, filters in result.plan.removed.items() for number in filters}
        for result in (one, other)
    )
    return len(first & second) / len(first | second)


def main() -> None:
    """Measure both devices, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--cpu-threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    try:
        accelerator = find_device("auto")
    except UsageError as error:
        sys.exit(str(error))
    if accelerator == CPU:
        sys.exit("torch finds no accelerator on this machine: there is nothing to measure")
    torch.set_num_threads(arguments.cpu_threads)
    model, images = make_case(arguments.network, arguments.images, ROOT, ROOT)
    rows, results = [], []
    for device in (accelerator, CPU):
        row, result = measure(copy.deepcopy(model).to(device), images)
        rows.append({"device": accelerator_name(device) or "cpu", **row})
        results.append(result)
        print(rows[-1], flush=True)
    for row in rows:
        row |= {
            "network": arguments.network,
            "images": arguments.images,
            "common_fraction": common_fraction(*results),
            "seed": SEED,
            "command": shlex.join(["python", "bench/gpu.py", *sys.argv[1:]]),
            "revision": revision(),
            "environment": surroundings(),
        }
        put_row(RESULTS, row, ("network", "images", "device"))


if __name__ == "__main__":
    main()
