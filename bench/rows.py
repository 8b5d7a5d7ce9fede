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
"""Takes down what a measuring process has found so far."""
SCHEMA_VERSION = 1


def bench_parser(description: str | None, *, limit: float) -> argparse.ArgumentParser:
    """The options that every bench of rows has, and those by which it calls itself."""
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
    """The rows of a result file; none where there is no file."""
    if not path.is_file():
        return []
    found: list[Row] = json.loads(path.read_text())["rows"]
    return found


def put_row(path: Path, row: Row, key: tuple[str, ...]) -> None:
    """Adds a row to the file, in the place of the one that agrees with it in every field of `key`.

    The file is read anew, so that two benches can fill it side by side.
    """
    found = read_rows(path)
    same = [i for i, old in enumerate(found) if all(old[field] == row[field] for field in key)]
    if same:
        found[same[0]] = row
    else:
        found.append(row)
    content = {"schema_version": SCHEMA_VERSION, "rows": found}
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)


def write_json(path: Path, content: Any) -> None:
    """Writes under a temporary name and renames."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def run_child(script: str, arguments: list[str], out: Path, limit: float) -> Row:
    """What `bench/SCRIPT --child ARGUMENTS --out OUT` wrote to `out` before it ended or was ended.

    Where it did not come to its end, `outcome` says so and `reason` why.
    """
    out.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "bench" / script), "--child", *arguments]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, "--out", str(out)], capture_output=True, text=True, timeout=limit
        )
        outcome = "ok" if done.returncode == 0 else "failed"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"ended with status {done.returncode}: {last[:300]}"
    except subprocess.TimeoutExpired:
        outcome, reason = "timeout", f"no end in {limit:g} s"
    found: Row = json.loads(out.read_text()) if out.is_file() else {}
    out.unlink(missing_ok=True)
    if outcome != "ok":
        found.update(outcome=outcome, reason=reason)
    found["wall_seconds"] = round(time.perf_counter() - start, 1)
    return found


def record(measure: Callable[[Note], None], out: Path, *packages: str) -> None:
    """Measures in this process and writes what is found to `out`, at each step.

    An error is a finding too: `outcome` is then `failed`, `stage` where it was, `reason` why.
    """
    row: Row = {"outcome": "failed", "environment": surroundings(*packages)}

    def note(**found: Any) -> None:
        row.update(found)
        row["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        write_json(out, row)

    try:
        measure(note)
    except Exception as error:
        note(outcome="failed", reason=reason_of(error))
    else:
        note(outcome="ok")


def revision() -> str:
    """The commit that is checked out, in short; empty outside of a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def surroundings(*packages: str) -> dict[str, Any]:
    """Versions and hardware, with the versions of further packages."""
    found = environment().model_dump(exclude_none=True)
    found.update({package: metadata.version(package) for package in packages})
    return found


def versions(row: Row) -> dict[str, Any]:
    """The part of a row's surroundings that must be the same for it to stand."""
    hardware = ("system", "processor", "cores", "threads", "accelerator")
    return {name: v for name, v in row["environment"].items() if name not in hardware}


def reason_of(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
