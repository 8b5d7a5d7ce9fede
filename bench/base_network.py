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
    """Return a training on CIFAR-10, from given or from random weights."""
    base = from_dict(read_tables(file), BaseConfig)
    start = None if weights is None else str(weights)
    return base.model_copy(
        update={
            "data": base.data.model_copy(update={"source": f"cifar10:{data}"}),
            "model": base.model.model_copy(update={"weights": start}),
        }
    )


def measure(data: str, weights: Path) -> Row:
    """Run the trainings, save the last one's weights in a folder, and return the results."""
    results, last = [], None
    for file in CONFIGS:
        folder = WORK / file.stem
        results.append(train_base(config(file, data, last), folder, resume=True))
        last = folder / WEIGHTS
    (network,) = read_spec(PRUNED).networks
    shutil.copyfile(str(last), weights / str(network.weights))
    trainings = [
        {
            "config": str(file.relative_to(ROOT)),
            "settings": result.config.train.model_dump(mode="json"),
            "seed": result.config.seed,
            "epochs": [[epoch.number, epoch.loss, epoch.validation] for epoch in result.epochs],
            "test_fraction": result.score.metric,
            "seconds": round(result.seconds, 1),
        }
        for file, result in zip(CONFIGS, results, strict=True)
    ]
    return {
        "command": "python bench/base_network.py --data DIR --weights DIR",
        "network": network.name,
        "trainings": trainings,
        "images": results[-1].score.images,
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }


def table(measured: Row) -> str:
    """Return the table of trainings."""
    lines = [
        "| network | training | epochs | validation top-1 | test top-1 | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for training in measured["trainings"]:
        number, _, validation = training["epochs"][-1]
        texts = [
            measured["network"],
            f"`{training['config']}`",
            str(number),
            f"{100 * validation:.2f}",
            f"{100 * training['test_fraction']:.2f}",
            f"{training['seconds'] / 60:.0f}",
        ]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def page(text: str, measured: Row) -> str:
    """Return the page with a current table."""
    return with_table(text, "results/base_network.json", table(measured))


def main() -> None:
    """Train the network and write its accuracy."""
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
