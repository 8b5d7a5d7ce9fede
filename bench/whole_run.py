"""Whole runs of pruning, interleaved with an older version's and with Torch-Pruning's.

`bench/speed.py --mode whole` measures them. Every run is a process of `bench/whole_run_case.py`;
the runs of a turn follow each other, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import ROOT, Row

SCRIPT = ROOT / "bench" / "whole_run_case.py"
NOW, BEFORE, PEER = "now", "before", "Torch-Pruning"


@dataclass(frozen=True)
class Case:
    """A network, the number of its images, and how often it is measured."""

    network: str
    images: int
    turns: int
    has_peer: bool = False
    action: str = "secateur"

    @property
    def name(self) -> str:
        """What the rows of the case are called."""
        return f"{self.network}, {'graph' if self.action == 'graph' else f'{self.images} images'}"


CASES = (
    Case("resnet20", 2000, 3),
    Case("resnet10", 60, 3),
    Case("efficientnet_b0", 256, 1),
    Case("resnet50", 256, 1, has_peer=True),
    Case("vgg16_bn", 128, 1),
    Case("resnet50", 2, 3, action="graph"),
    Case("resnet152", 2, 3, action="graph"),
)


@dataclass(frozen=True)
class Folders:
    """Where things are: the older version's working tree, CIFAR-10, and weights."""

    before: Path
    data: Path
    weights: Path

    @property
    def revision_before(self) -> str:
        """The short hash of the older version."""
        command = ["git", "-C", str(self.before), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure(case: Case, folders: Folders, threads: int) -> Row:
    """Run the case, interleaved; return its runs by version, or the reason why there are none."""
    versions = [BEFORE, NOW, *([PEER] if case.has_peer else [])]
    runs: dict[str, list[Row]] = {version: [] for version in versions}
    for _ in range(case.turns):
        for version in versions:
            process = _run(case, version, folders, threads)
            if process.returncode:
                reason = f"{version}: {(process.stderr.strip().splitlines() or ['?'])[-1][:300]}"
                return {"outcome": "failed", "reason": reason, "runs": runs}
            runs[version].append(json.loads(process.stdout.splitlines()[-1]))
    return {"outcome": "ok", "runs": runs, "revision_before": folders.revision_before}


def _run(
    case: Case, version: str, folders: Folders, threads: int
) -> subprocess.CompletedProcess[str]:
    root = folders.before if version == BEFORE else ROOT
    action = "torch-pruning" if version == PEER else case.action
    command = [sys.executable, str(SCRIPT), case.network, action, "--images", str(case.images)]
    command += ["--data", str(folders.data), "--weights", str(folders.weights)]
    command += ["--threads", str(threads)]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def whole_run_table(rows: Sequence[Row]) -> str:
    """Return processor seconds before and now, in forward passes, and peak memory."""
    lines = [
        "| run | seconds before | now | ratio | forward passes before | now "
        "| MiB before | now | Torch-Pruning, seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["mode"] != "whole":
            continue
        if row["outcome"] != "ok":
            lines.append(f"| {row['network']} | {row['reason'].replace('|', ' ')} ||||||||")
            continue
        before, now = (_medians(row["runs"][version]) for version in (BEFORE, NOW))
        peer = row["runs"].get(PEER)
        is_graph = row["network"].endswith("graph")
        passes = ["", ""] if is_graph else [f"{r['passes']:.1f}" for r in (before, now)]
        cells = [
            row["network"],
            f"{before['cpu_seconds']:.2f}" if is_graph else f"{before['cpu_seconds']:.1f}",
            f"{now['cpu_seconds']:.2f}" if is_graph else f"{now['cpu_seconds']:.1f}",
            f"{now['cpu_seconds'] / before['cpu_seconds']:.2f}",
            *passes,
            f"{before['peak_memory_mib']:.0f}",
            f"{now['peak_memory_mib']:.0f}",
            f"{_medians(peer)['cpu_seconds']:.1f}" if peer else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _medians(runs: Sequence[Row]) -> dict[str, float]:
    medians = {
        name: statistics.median(run[name] for run in runs)
        for name in ("cpu_seconds", "peak_memory_mib")
    }
    medians["passes"] = statistics.median(
        run["cpu_seconds"] / run["forward_cpu_seconds"] for run in runs
    )
    return medians
