"""Result files with one measurement a line, as JSON, which several processes can append to.

A process that is killed loses only its current measurement; rows in the file are not measured
again.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rows import ROOT

Measurement = dict[str, Any]
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_ARENA_MAX": "1",
}
"""Settings of glibc: a process keeps freed memory, as in `secateur.runtime.kept_memory`."""


def read_measurements(path: Path, fields: Sequence[str]) -> list[Measurement]:
    """Return the measurements in a file; of those that agree in all `fields`, the last one."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({key_of(measurement, fields): measurement for measurement in lines}.values())


def key_of(measurement: Measurement, fields: Sequence[str]) -> tuple[Any, ...]:
    """Return the values of `fields` in a measurement; `part.key` is a key of a nested table."""
    return tuple(
        functools.reduce(operator.getitem, field.split("."), measurement) for field in fields
    )


def append_measurement(path: Path, measurement: Measurement) -> None:
    """Append a measurement to a file."""
    with path.open("a") as file:
        file.write(json.dumps(measurement) + "\n")


def run_all(script: str, calls: Iterable[Sequence[str]], workers: int) -> None:
    """Run `bench/SCRIPT ARGUMENTS` for each list of arguments, `workers` at a time.

    Raises `SystemExit` at the end if one of them failed.
    """

    def run(arguments: Sequence[str]) -> int:
        command = [sys.executable, str(ROOT / "bench" / script), *arguments]
        return subprocess.run(command, env=os.environ | MALLOC_SETTINGS).returncode

    with ThreadPoolExecutor(workers) as pool:
        exit_codes = list(pool.map(run, calls))
    if any(exit_codes):
        raise SystemExit(f"{sum(map(bool, exit_codes))} of {len(exit_codes)} processes failed")
