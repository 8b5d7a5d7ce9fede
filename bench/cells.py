"""A result file of cells, a line of JSON each, that processes working side by side append to.

A process that is killed loses the cell that it was at; what is in the file is not measured again.
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
from secateur.experiments.compare.runner import MALLOC_SETTINGS

Cell = dict[str, Any]


def read_cells(path: Path, fields: Sequence[str]) -> list[Cell]:
    """What has been measured; of cells that agree in all `fields` the last one."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return list({key_of(cell, fields): cell for cell in lines}.values())


def key_of(cell: Cell, fields: Sequence[str]) -> tuple[Any, ...]:
    """What tells a cell from others; `part.key` is a key of a part of it."""
    return tuple(functools.reduce(operator.getitem, field.split("."), cell) for field in fields)


def put_cell(path: Path, cell: Cell) -> None:
    """Appends a cell to the file."""
    with path.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def run_all(script: str, calls: Iterable[Sequence[str]], jobs: int) -> None:
    """Runs `bench/SCRIPT ARGUMENTS` for each list of arguments, `jobs` at a time.

    Raises `SystemExit` at the end where one of them failed.
    """

    def run(arguments: Sequence[str]) -> int:
        command = [sys.executable, str(ROOT / "bench" / script), *arguments]
        return subprocess.run(command, env=os.environ | MALLOC_SETTINGS).returncode

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(run, calls))
    if any(done):
        raise SystemExit(f"{sum(map(bool, done))} of {len(done)} processes failed")
