"""ResNet-20 on CIFAR-10: criteria, targets and refits under one protocol, as the docs quote them.

    python bench/resnet20.py --data cifar10:DIR --weights cifar10_resnet20.safetensors

runs `secateur prune` once a row, in a process of its own, and after every row writes
`results/resnet20_cifar10.json`; rows that are there already are kept, so it can be interrupted.
Then it writes the tables into README.md and docs/method.md; `--tables` does only that.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import with_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "resnet20_cifar10.json"
CRITERIA = ("vote", "vote-response", "vote-iou", "random", "l1", "l2", "taylor", "activation_std")
TARGETS = ("macs=0.7", "macs=0.5")

Row = dict[str, Any]
Table = Callable[[list[Row]], str]


def rows() -> list[tuple[str, ...]]:
    """The options of each row."""
    untrained = [
        ("--criterion", criterion, "--target", target, "--no-finetune")
        for criterion in CRITERIA
        for target in TARGETS
    ]
    variants = [
        ("--criterion", "vote", "--target", target, "--no-finetune", *more)
        for more in (("--refit", "readers"), ("--no-stratify",))
        for target in TARGETS
    ]
    tuned = ("--criterion", "vote", "--target", "macs=0.7", "--epochs", "5")
    return [*untrained[:2], tuned, *variants, *untrained[2:]]


def measure(options: tuple[str, ...], data: str, weights: str) -> Row:
    """One run of the command line: its command, wall time and result."""
    # Equal shares and no more: the rows compare criteria and refits (training_free.py the rest).
    common = ["prune", "--model", "resnet20", "--weights", weights, "--data", data]
    common += ["--allocation", "uniform", "--no-norms"]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        arguments = [*common, *options]
        start = time.perf_counter()
        launcher = [sys.executable, "-c", "from secateur.cli import main; main()"]
        subprocess.run([*launcher, *arguments, "--out", str(out)], check=True)
        wall_seconds = time.perf_counter() - start
        result = json.loads((out / "result.json").read_text())
    return {
        "command": shlex.join(["secateur", *arguments, "--out", "RUN"]),
        "options": list(options),
        "wall_seconds": round(wall_seconds, 1),
        "probe_seed": result["config"]["seed"],
        "plan_hash": result["plan_hash"],
        "law_error": result["law_error"],
        "stages": result["stages"],
        "epochs": result["epochs"],
        "config": result["config"],
        "environment": result["environment"],
    }


def read_results() -> list[Row]:
    """The rows measured so far."""
    if not RESULTS.is_file():
        return []
    found: list[Row] = json.loads(RESULTS.read_text())["rows"]
    return found


def write_results(found: list[Row]) -> None:
    """Writes all rows under a temporary name and renames it."""
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    content = {"schema_version": 1, "written_by": "python bench/resnet20.py", "rows": found}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(RESULTS)


def _percent(row: Row | None, stage: str) -> str:
    stages = {s["stage"]: s["score"] for s in row["stages"]} if row else {}
    return f"{100 * stages[stage]['top1_fraction']:.2f}" if stage in stages else "–"


def _find(found: list[Row], *options: str) -> Row | None:
    return next((row for row in found if row["options"] == list(options)), None)


def criteria_table(found: list[Row]) -> str:
    """Top-1 on the test images for every criterion and target, without training."""
    base = next((row for row in found), None)
    lines = [
        f"Test top-1 in %, 10,000 images; before: {_percent(base, 'before')}.",
        "",
        "| criterion | 70 % of MACs: cut → refit | 50 % of MACs: cut → refit |",
        "|---|---|---|",
    ]
    for criterion in CRITERIA:
        cells = []
        for target in TARGETS:
            row = _find(found, "--criterion", criterion, "--target", target, "--no-finetune")
            cells.append(f"{_percent(row, 'cut')} → {_percent(row, 'refit')}")
        name = f"{criterion} (default)" if criterion == "vote" else criterion
        lines.append(f"| {name} | {' | '.join(cells)} |")
    tuned = _find(found, "--criterion", "vote", "--target", "macs=0.7", "--epochs", "5")
    lines += [
        "",
        f"With five epochs of fine-tuning after the refit (vote, 70 % of MACs): "
        f"{_percent(tuned, 'tuned')}.",
    ]
    return "\n".join(lines)


def refit_table(found: list[Row]) -> str:
    """Top-1 after each way to refit."""
    lines = ["| kernels re-estimated | 70 % of MACs | 50 % of MACs |", "|---|---|---|"]
    for title, stage, more in (
        ("none", "cut", ()),
        ("readers of cut channels (`--refit readers`)", "refit", ("--refit", "readers")),
        ("every layer from the first cut on (default)", "refit", ()),
        ("the same, probe images drawn without labels", "refit", ("--no-stratify",)),
    ):
        cells = [
            _percent(
                _find(
                    found,
                    *("--criterion", "vote", "--target", target, "--no-finetune"),
                    *more,
                ),
                stage,
            )
            for target in TARGETS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: tuple[tuple[Path, str, Table], ...] = (
    (ROOT / "README.md", "results/resnet20_cifar10.json", criteria_table),
    (ROOT / "docs" / "method.md", "results/resnet20_cifar10.json refit", refit_table),
)
"""File, what its marker names, and what stands between the markers."""


def write_tables(found: list[Row]) -> None:
    """Brings the tables of the documentation up to date."""
    for path, name, table in TABLES:
        path.write_text(with_table(path.read_text(), name, table(found)))


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="cifar10:DIR")
    parser.add_argument("--weights", help="weights of ResNet-20")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    found = read_results()
    if not arguments.tables:
        if arguments.data is None or arguments.weights is None:
            parser.error("--data and --weights are needed")
        for options in rows():
            if _find(found, *options) is None:
                found.append(measure(options, arguments.data, arguments.weights))
                found.sort(key=lambda row: rows().index(tuple(row["options"])))
                write_results(found)
    write_tables(found)


if __name__ == "__main__":
    main()
