"""Train the VGG-16 that is to be pruned, on CIFAR-10.

    python bench/base_network.py --data DIR --weights DIR

This runs `secateur train` with `configs/vgg16_cifar10_base_1.toml` and then, from those weights,
with `configs/vgg16_cifar10_base_2.toml`. An interrupted training resumes from its checkpoints in
`runs/base_network`. The weights are saved in the folder `--weights`, under the name that
`configs/paper/vgg16_cifar10.toml` expects. Their accuracy goes to `results/base_network.json` and
to the table in docs/research/training.md; without arguments only the table is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rows import ROOT, Row, revision, surroundings, write_json
from secateur.config import BaseConfig, from_dict, read_tables
from secateur.experiments.compare.spec import read_spec
from secateur.experiments.manifest import WEIGHTS
from secateur.experiments.train_base import train_base
from tables import with_table

RESULTS = ROOT / "results" / "base_network.json"
PAGE = ROOT / "docs" / "research" / "training.md"
CONFIGS = [ROOT / "configs" / f"vgg16_cifar10_base_{number}.toml" for number in (1, 2)]
PRUNED = ROOT / "configs" / "paper" / "vgg16_cifar10.toml"
WORK = ROOT / "runs" / "base_network"


def config(file: Path, data: str, weights: Path | None) -> BaseConfig:
    """A training on CIFAR-10, from some weights or from random ones."""
    found = from_dict(read_tables(file), BaseConfig)
    start = None if weights is None else str(weights)
    return found.model_copy(
        update={
            "data": found.data.model_copy(update={"source": f"cifar10:{data}"}),
            "model": found.model.model_copy(update={"weights": start}),
        }
    )


def measure(data: str, weights: Path) -> Row:
    """The trainings, and what they came to; leaves the last one's weights in a folder."""
    found, last = [], None
    for file in CONFIGS:
        folder = WORK / file.stem
        found.append(train_base(config(file, data, last), folder, resume=True))
        last = folder / WEIGHTS
    (network,) = read_spec(PRUNED).networks
    shutil.copyfile(str(last), weights / str(network.weights))
    trainings = [
        {
            "config": str(file.relative_to(ROOT)),
            "settings": each.config.train.model_dump(mode="json"),
            "seed": each.config.seed,
            "epochs": [[e.number, e.loss, e.validation] for e in each.epochs],
            "test_fraction": each.score.top1_fraction,
            "seconds": round(each.seconds, 1),
        }
        for file, each in zip(CONFIGS, found, strict=True)
    ]
    return {
        "command": "python bench/base_network.py --data DIR --weights DIR",
        "network": network.name,
        "trainings": trainings,
        "images": found[-1].score.images,
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(found: Row) -> str:
    """What came of each training."""
    lines = [
        "| network | training | epochs | validation top-1 | test top-1 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for training in found["trainings"]:
        number, _, validation = training["epochs"][-1]
        texts = [
            found["network"],
            f"`{training['config']}`",
            str(number),
            f"{100 * validation:.2f}",
            f"{100 * training['test_fraction']:.2f}",
            f"{training['seconds'] / 60:.0f}",
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def page(text: str, found: Row) -> str:
    """The page with its table brought up to date."""
    return with_table(text, "results/base_network.json", table(found))


def main() -> None:
    """Trains it and writes what it is worth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="the folder for the weights")
    arguments = parser.parse_args()
    if arguments.weights is not None:
        write_json(RESULTS, measure(arguments.data, arguments.weights))
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
