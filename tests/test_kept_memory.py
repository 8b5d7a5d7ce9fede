"""Freed memory is kept within a block, and the process is as before afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

PROGRAM = """
import resource
import psutil, torch
from secateur.runtime.kept_memory import give_memory_back, kept_memory

SIZE = 64 * 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return psutil.Process().memory_info().rss

faults()
before = faults()
with kept_memory():
    with kept_memory():
        pass
    # What is freed is not always one piece: it takes some rounds until a piece is large enough.
    kept = min(faults() for _ in range(12))
    held = resident()
    give_memory_back()
    given_back_between = held - resident()
    faults()
    held = resident()
given_back_after = held - resident()
print(before, kept, faults(), given_back_between, given_back_after)
"""


def run_program(environment: Mapping[str, str]) -> list[int]:
    """Return page faults of a large tensor before, in and after a block, and bytes given back.

    Those are given back within the block, on request, and at its end.
    """
    inherited = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**inherited, **environment},
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_kept_in_a_block_and_given_back_on_request_and_after_it() -> None:
    before, kept, after, *given_back = run_program({})
    assert before > 30  # a fault for each page, which may have 2 MiB
    assert kept < before / 10
    assert after > 0.9 * before
    assert min(given_back) > 60 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_thresholds_that_the_environment_sets_stay() -> None:
    before, in_block, after, *_ = run_program({"MALLOC_MMAP_THRESHOLD_": "1000000"})
    assert min(before, in_block, after) > 30
