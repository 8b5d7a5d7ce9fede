"""A result file of rows: each is measured in a process of its own and written at once.

A measuring process may die, hang or run out of memory; what it found until then is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from secateur.runtime.environment import environment

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
Note = Callable[..., None]
"""Records what a measuring process has found so far."""
SCHEMA_VERSION = 1


def bench_parser(description: str | None, *, limit: float) -> argparse.ArgumentParser:
    """Return a parser with the options that all such benches share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default="*", help="pattern of names, such as '*resnet*'")
    parser.add_argument("--limit", type=float, default=limit, help="seconds for each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", metavar="PATTERN", help="measure these rows anew")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for option in ("--network", "--out"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    return parser


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a result file; none if there is no file."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


def put_row(path: Path, row: Row, key: tuple[str, ...]) -> None:
    """Add a row to the file, or replace the one that agrees with it in every field of `key`.

    The file is read again first, so that two benches can fill it at the same time.
    """
    rows = read_rows(path)
    same = [i for i, old in enumerate(rows) if all(old[field] == row[field] for field in key)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    content = {"schema_version": SCHEMA_VERSION, "rows": rows}
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def run_child(script: str, arguments: list[str], out: Path, limit: float) -> Row:
    """Run `bench/SCRIPT --child ARGUMENTS --out OUT`, and return what it wrote to `out`.

    If it failed or exceeded the limit, `outcome` says so and `reason` says why.
    """
    out.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "bench" / script), "--child", *arguments]
    start = time.perf_counter()
    try:
        process = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, timeout=limit
        )
        outcome = "ok" if process.returncode == 0 else "failed"
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"ended with status {process.returncode}: {last[:300]}"
    except subprocess.TimeoutExpired:
        outcome, reason = "timeout", f"no end in {limit:g} s"
    result: Row = json.loads(out.read_text()) if out.is_file() else {}
    out.unlink(missing_ok=True)
    if outcome != "ok":
        result.update(outcome=outcome, reason=reason)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    return result


def record(measure: Callable[[Note], None], out: Path, *packages: str) -> None:
    """Measure in this process, and write the results to `out` after each step.

    After an error `outcome` is `failed`, `stage` says where, and `reason` why.
    """
    row: Row = {"outcome": "failed", "environment": surroundings(*packages)}

    def note(**results: Any) -> None:
        row.update(results)
        row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        write_json(out, row)

    try:
        measure(note)
    except Exception as error:
        note(outcome="failed", reason=reason_of(error))
    else:
        note(outcome="ok")


def revision() -> str:
    """Return the short hash of the current commit; empty outside a repository or without git."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def surroundings(*packages: str) -> dict[str, Any]:
    """Return versions and hardware, with the versions of further packages."""
    versions = environment().model_dump(exclude_none=True)
    versions.update({package: metadata.version(package) for package in packages})
    return versions


def versions(row: Row) -> dict[str, Any]:
    """Return the part of a row's environment that must be equal for the row to be kept."""
    hardware = ("system", "processor", "cores", "threads", "accelerator")
    return {name: v for name, v in row["environment"].items() if name not in hardware}


def reason_of(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
