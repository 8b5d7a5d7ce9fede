"""Trains the VGG-16 that is to be pruned, on CIFAR-10.

    python bench/base_network.py --data DIR --weights DIR

as `secateur train` does by `configs/vgg16_cifar10_base.toml`; a training that was interrupted goes
on from its checkpoints in `runs/base_network`. The weights are left in the folder of weights, under
the name by which `configs/paper/vgg16_cifar10.toml` calls them. What they are worth goes to
`results/base_network.json`, and to the table in docs/training.md; without arguments only the table
is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rows import ROOT, Row, revision, surroundings, write_json
from secateur.base import BaseConfig, train_base
from secateur.config import from_dict, read_tables
from secateur.manifest import WEIGHTS
from secateur.sweep import read_comparison
from tables import with_table

RESULTS = ROOT / "results" / "base_network.json"
PAGE = ROOT / "docs" / "training.md"
CONFIG = ROOT / "configs" / "vgg16_cifar10_base.toml"
PRUNED = ROOT / "configs" / "paper" / "vgg16_cifar10.toml"
WORK = ROOT / "runs" / "base_network"


def config(data: str) -> BaseConfig:
    """The training, on the CIFAR-10 in a folder."""
    found = from_dict(read_tables(CONFIG), BaseConfig)
    images = found.data.model_copy(update={"source": f"cifar10:{data}"})
    return found.model_copy(update={"data": images})


def measure(data: str, weights: Path) -> Row:
    """The training, and what it came to; leaves the weights in a folder."""
    found = train_base(config(data), WORK, resume=True)
    (network,) = read_comparison(PRUNED).networks
    shutil.copyfile(WORK / WEIGHTS, weights / str(network.weights))
    return {
        "command": "python bench/base_network.py --data DIR --weights DIR",
        "config": str(CONFIG.relative_to(ROOT)),
        "network": network.name,
        "settings": found.config.train.model_dump(mode="json"),
        "seed": found.config.seed,
        "epochs": [[e.number, e.loss, e.validation] for e in found.epochs],
        "test_fraction": found.score.top1_fraction,
        "images": found.score.images,
        "seconds": round(found.seconds, 1),
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(found: Row) -> str:
    """What came of the training."""
    number, _, validation = found["epochs"][-1]
    texts = [
        found["network"],
        f"`{found['config']}`",
        str(number),
        f"{100 * validation:.2f}",
        f"{100 * found['test_fraction']:.2f}",
        f"{found['seconds'] / 60:.0f}",
        found["environment"].get("accelerator", "CPU"),
    ]
    return "\n".join(
        [
            "| network | training | epochs | validation top-1 | test top-1 | minutes | on |",
            "|---|---|---|---|---|---|---|",
            f"| {' | '.join(texts)} |",
        ]
    )


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
