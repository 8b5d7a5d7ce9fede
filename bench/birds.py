"""VGG-16 on birds: train a base, prune it without training, then fine-tune it.

    python bench/birds.py --data DIR --weights DIR [--seeds 3] [--epochs 20]
        [--learning-rates 0.001 0.004]

`--data` is the folder of CUB-200 in the layout of its 2011 edition (here 3,400 images of the 2010
edition), `--weights` that of `vgg16_features_fp16.safetensors` and of the head,
`cub200_2010_classifier_fp16.safetensors`. The base is trained by `secateur train` from these, once
for each learning rate; the validation images choose one. Then `secateur prune` cuts it, refits it
and fine-tunes it, once for each seed, all at a time. Each run adds a line to `results/birds.jsonl`
when it ends. Run folders are in `runs/birds`: finished ones are not made again, and an interrupted
run resumes from its own. The table is in docs/research/training.md. It takes hours without a GPU;
fewer epochs, of the base and of the fine-tuning alike, are a run of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from measurements import Measurement, append_measurement, key_of, read_measurements
from rows import ROOT, revision, surroundings
from tables import with_table

RESULTS = ROOT / "results" / "birds.jsonl"
PAGE = ROOT / "docs" / "research" / "training.md"
WORK = ROOT / "runs" / "birds"
NETWORK = f"{ROOT / 'bench' / 'birds_network.py'}:vgg16_birds"
KEY = ("target", "seed", "settings.epochs")
TARGET = "macs=0.48"
"""The strongest published figure is for 52 % fewer FLOPs."""
LEARNING_RATES = (0.001, 0.004)
FINETUNED_LEARNING_RATE = 0.004
CALIBRATION_IMAGES = 1000
PREPROCESSING = (
    *("--set", "data.mean=[0.485,0.456,0.406]", "--set", "data.std=[0.229,0.224,0.225]"),
    *("--set", "data.image_size=224"),
)


def main() -> None:
    """Train the base, prune and fine-tune it, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of CUB-200")
    parser.add_argument("--weights", type=Path, help="the folder of the two weight files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the base and of fine-tuning")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=LEARNING_RATES)
    arguments = parser.parse_args()
    epochs = arguments.epochs
    if arguments.data is not None and arguments.weights is not None:
        base = make_base(arguments.data, arguments.weights, epochs, arguments.learning_rates)
        known = {key_of(row, KEY) for row in read_measurements(RESULTS, KEY)}
        seeds = [seed for seed in range(arguments.seeds) if (TARGET, seed, epochs) not in known]
        do_together(partial(prune, arguments.data, base, seed, epochs) for seed in seeds)
    PAGE.write_text(
        with_table(PAGE.read_text(), "results/birds.jsonl", table(read_measurements(RESULTS, KEY)))
    )


def make_base(data: Path, weights: Path, epochs: int, learning_rates: Sequence[float]) -> Path:
    """Return the folder of the base whose last epoch was best on the validation images."""
    start = WORK / "start.safetensors"
    WORK.mkdir(parents=True, exist_ok=True)
    if not start.is_file():
        tensors = load_file(weights / "vgg16_features_fp16.safetensors")
        tensors |= load_file(weights / "cub200_2010_classifier_fp16.safetensors")
        save_file({name: tensor.float() for name, tensor in tensors.items()}, start)
    folders = {rate: WORK / f"base-{epochs}-{rate}" for rate in learning_rates}
    do_together(
        partial(
            run_secateur,
            [
                *("train", "-m", NETWORK, "-w", str(start), "-d", f"cub:{data}", *PREPROCESSING),
                *("--epochs", str(epochs), "--learning-rate", str(rate), "-o", str(folder)),
                *("--set", "train.batch_size=32", "--set", "train.crop=random_crop", "--resume"),
            ],
        )
        for rate, folder in folders.items()
        if not (folder / "training.json").is_file()
    )

    def validation(folder: Path) -> float:
        result = json.loads((folder / "training.json").read_text())
        return float(result["epochs"][-1]["validation"])

    return max(folders.values(), key=validation)


def prune(data: Path, base: Path, seed: int, epochs: int) -> None:
    """Prune and fine-tune the base with a seed, and record what that gave."""
    folder = WORK / f"pruned-{epochs}-{seed}"
    run_secateur(
        [
            *("prune", "-m", NETWORK, "-w", str(base / "model.safetensors"), "-d", f"cub:{data}"),
            *(*PREPROCESSING, "-t", TARGET, "--seed", str(seed), "-o", str(folder), "--resume"),
            *("--epochs", str(epochs), "--learning-rate", str(FINETUNED_LEARNING_RATE)),
            *("--set", "finetune.batch_size=32", "--set", "finetune.crop=random_crop"),
            *("--set", f"data.calibration_images={CALIBRATION_IMAGES}"),
            *("--set", "report.images=0"),
        ]
    )
    append_measurement(RESULTS, measurement_of(folder, base, seed))


def do_together(actions: Iterable[Callable[[], None]]) -> None:
    """Do everything at a time; when all have ended, raise what one of them raised, if any."""
    waiting = list(actions)
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        futures = [pool.submit(action) for action in waiting]
    for future in futures:
        future.result()


def run_secateur(arguments: Sequence[str]) -> None:
    """Run secateur in a process of its own; raises `SystemExit` if it failed."""
    if subprocess.run([sys.executable, "-m", "secateur", *arguments]).returncode:
        raise SystemExit("a run failed: its message is above")


def measurement_of(folder: Path, base: Path, seed: int) -> Measurement:
    """Return what a run folder says of a seed."""
    result = json.loads((folder / "result.json").read_text())
    scores = {stage["stage"]: stage["score"] for stage in result["stages"]}
    before, after = scores["before"], scores["finetuned"]
    return {
        "target": TARGET,
        "seed": seed,
        "images": before["images"],
        "test_fraction": {stage: score["metric"] for stage, score in scores.items()},
        "macs_left": after["macs"] / before["macs"],
        "parameters_left": after["parameters"] / before["parameters"],
        "base_learning_rate": float(base.name.rpartition("-")[2]),
        "settings": result["config"]["finetune"],
        "seconds": {stage["stage"]: round(stage["seconds"], 1) for stage in result["stages"]},
        "command": "python bench/birds.py --data DIR --weights DIR",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(measurements: list[Measurement]) -> str:
    """Return top-1 on the test images by stage and seed."""
    lines = [
        "| MACs left | epochs | seed | base | cut | refit | fine-tuned | points lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for measurement in sorted(measurements, key=lambda measurement: key_of(measurement, KEY)):
        fractions = measurement["test_fraction"]
        stages = ("before", "cut", "refit", "finetuned")
        texts = [
            f"{measurement['macs_left']:.3f}",
            str(measurement["settings"]["epochs"]),
            str(measurement["seed"]),
            *(f"{100 * fractions[stage]:.1f}" for stage in stages),
            f"{100 * (fractions['before'] - fractions['finetuned']):.1f}",
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
