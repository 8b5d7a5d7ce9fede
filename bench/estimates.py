"""Compare estimated with measured time and memory.

    python bench/estimates.py --data DIR --weights DIR

Four networks are pruned with three numbers of images each: ResNet-20 on CIFAR-10 (`--data` is its
folder, `--weights` that of the weights), torchvision's with random weights on random images.
MobileNet-V2's are JPEG files in a folder, its runs write a report, too. Every run is a process of
its own, with one thread. Time is the processor's: what other processes take does not count. Writes
`results/estimates.json` and the table in docs/reference/estimates.md; `--tables` only the table.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rows import ROOT, Row, put_row, read_rows, revision, run_child, surroundings, write_json
from tables import with_table

RESULTS = ROOT / "results" / "estimates.json"
PAGE = ROOT / "docs" / "reference" / "estimates.md"
KEY = ("network", "images", "side")
COMMAND = "python bench/estimates.py --data DIR --weights DIR"
LIMIT = 900.0
"""Seconds for a run."""
WITHIN = 1.5
"""The factor that estimates of time are to be within."""
FILES = "mobilenet_v2"
"""The network whose images are files."""
STORED_SIDE = 256
TEST_FILES = 16
TARGET = "macs=0.5"


@dataclass(frozen=True)
class Run:
    """A network and the images that it is pruned with."""

    network: str
    images: int
    side: int


RUNS = (
    *(Run("resnet20", images, 32) for images in (200, 1000, 2000)),
    *(Run("mobilenet_v2", images, side) for images, side in ((48, 96), (100, 128), (48, 224))),
    *(Run("efficientnet_b0", images, side) for images, side in ((32, 96), (64, 128), (32, 192))),
    *(Run("resnet50", images, side) for images, side in ((24, 64), (48, 96), (32, 160))),
)


# --- measuring, in a process of its own --------------------------------------------------------


def measure(run: Run, arguments: argparse.Namespace) -> Row:
    """Return the estimate of a run and what it took."""
    # Before anything is imported that times: then budgets of time are the processor's as well.
    time.perf_counter = time.process_time
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if run.network == FILES:
        return _with_files(run)
    return _in_memory(run, arguments)


def _in_memory(run: Run, arguments: argparse.Namespace) -> Row:
    import torch
    import torchvision

    import secateur

    if run.network == "resnet20":
        dataset = secateur.load_data(f"cifar10:{arguments.data}", validation_fraction=0.1, seed=0)
        from secateur.data.preprocessing import Preprocessing

        chosen = torch.randperm(len(dataset.train.labels))[: run.images]
        preprocessing = Preprocessing(run.side, run.side)
        images = preprocessing.normalise(dataset.train.read(chosen, preprocessing))
        weights = Path(arguments.weights) / "cifar10_resnet20.safetensors"
        model = secateur.load_model("resnet20", str(weights), num_classes=10)
    else:
        model = getattr(torchvision.models, run.network)()
        images = torch.randn(run.images, 3, run.side, run.side)
        with torch.no_grad():  # norm statistics, without which signals vanish
            model.train()(images[:16])
        model.eval()
    expected = secateur.estimate(model, images, target=TARGET)
    since = time.process_time()
    pruned = secateur.prune(model, images, target=TARGET)
    seconds = time.process_time() - since
    by_stage = {str(stage.stage): stage.seconds for stage in pruned.result.stages}
    return _row(asdict(expected), seconds, by_stage)


def _with_files(run: Run) -> Row:
    import torch
    from PIL import Image

    from secateur.config import RunConfig, from_dict
    from secateur.experiments import run as runs

    with tempfile.TemporaryDirectory() as folder:
        for part, count in (("train", round(run.images / 0.9)), ("test", TEST_FILES)):
            for number in range(count):
                place = Path(folder, "images", part, f"class{number % 2}", f"{number}.jpg")
                place.parent.mkdir(parents=True, exist_ok=True)
                coarse = torch.randint(0, 256, (3, 16, 16)).float()[None]
                sides = (STORED_SIDE, STORED_SIDE)
                pixels = torch.nn.functional.interpolate(coarse, sides, mode="bilinear")[0]
                Image.fromarray(pixels.byte().movedim(0, -1).numpy()).save(place)
        tables = {
            "model": {"name": f"torchvision:{run.network}", "allow_untrained": True},
            "data": {
                "source": f"folder:{folder}/images",
                "image_size": run.side,
                "calibration_images": run.images,
            },
            "plan": {"target": TARGET},
            "finetune": {"epochs": 0},
        }
        config = from_dict(tables, RunConfig)
        expected = runs.dry_run(config)
        since = time.process_time()
        result = runs.run(config, Path(folder, "run"))
        seconds = time.process_time() - since
    by_stage = {str(stage.stage): stage.seconds for stage in result.stages}
    return _row(asdict(expected), seconds, by_stage)


def _row(expected: Row, seconds: float, by_stage: Mapping[str, float]) -> Row:
    """Return a row, with the largest memory that this process had."""
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert peak is not None
    return {
        "expected_seconds": expected["seconds"],
        "expected_memory_bytes": expected["memory_bytes"],
        "seconds": seconds,
        "stage_seconds": dict(by_stage),
        "memory_bytes": int(peak[1]) * 1024,
    }


# --- the table ---------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Return a line for each run: estimated, measured, and the one over the other."""
    quantities = (
        "estimated, s",
        "measured, s",
        "ratio",
        "estimated, GiB",
        "measured, GiB",
        "ratio",
    )
    heads = ("network", "images", *quantities)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for run in RUNS:
        for row in rows:
            if (row["network"], row["images"], row["side"]) != (run.network, run.images, run.side):
                continue
            name = f"| {run.network} | {run.images} of {run.side}² "
            if "seconds" not in row:
                lines.append(f"{name}| {row['outcome']}: {row['reason']} | | | | | |")
                continue
            pairs = (
                (sum(row["expected_seconds"].values()), row["seconds"], 1, 1),
                (row["expected_memory_bytes"], row["memory_bytes"], 2**30, 2),
            )
            cells = (
                f"| {expected / unit:.{digits}f} | {measured / unit:.{digits}f} "
                f"| {expected / measured:.2f} "
                for expected, measured, unit, digits in pairs
            )
            lines.append(f"{name}{''.join(cells)}|")
    return "\n".join(lines)


def ratios(rows: list[Row]) -> list[float]:
    """Return estimated over measured time of every row."""
    return [
        sum(row["expected_seconds"].values()) / row["seconds"] for row in rows if "seconds" in row
    ]


def page(text: str, rows: list[Row]) -> str:
    """Return the page with the current table."""
    return with_table(text, "estimates", table(rows))


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--weights", default="data/weights")
    parser.add_argument("--only", default="*", help="pattern of networks")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for option in ("--network", "--images", "--side", "--out"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run = Run(arguments.network, int(arguments.images), int(arguments.side))
        write_json(Path(arguments.out), {"outcome": "ok", **measure(run, arguments)})
        return
    for run in () if arguments.tables else RUNS:
        if not fnmatch.fnmatch(run.network, arguments.only):
            continue
        passed = {**asdict(run), "data": arguments.data, "weights": arguments.weights}
        options = [text for key, value in passed.items() for text in (f"--{key}", str(value))]
        with tempfile.TemporaryDirectory() as folder:
            result = run_child("estimates.py", options, Path(folder, "row.json"), LIMIT)
        row = {
            **asdict(run),
            **result,
            "command": "python bench/estimates.py --data DIR --weights DIR",
        }
        put_row(RESULTS, {**row, "revision": revision(), "environment": surroundings()}, KEY)
        print(table([row]).splitlines()[-1], flush=True)
    PAGE.write_text(page(PAGE.read_text(), read_rows(RESULTS)))


if __name__ == "__main__":
    main()
