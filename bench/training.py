"""Measure the speed of the trainer beside a bare loop that does the same work.

    python bench/training.py --data cifar10:DIR

A ResNet-20 is trained for `STEPS` steps by secateur's trainer, and by a loop over normalised
tensors in memory with the same augmentation, precision, loss and optimiser. The two are
interleaved, so that a busy machine slows both alike. In the same rounds the trainer trains that
network pruned to `TARGET`, with and without `torch.compile`. `results/training.json` gets the
images per second of each and the ratios, by the medians; the tables in docs/research/training.md
are written from it.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coverage import l2_scores
from interleaved import time_interleaved
from measurements import run_all
from rows import ROOT, Row, revision, surroundings, write_json
from secateur import data
from secateur.config import Budget, TrainingSection
from secateur.data import Images
from secateur.data.augmentation import Augmentation
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.models import zoo
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import make_plan
from secateur.runtime.precision import autocast
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData
from tables import with_table

RESULTS = ROOT / "results" / "training.json"
PAGE = ROOT / "docs" / "research" / "training.md"
NETWORK = "resnet20"
STEPS = 120
SETTINGS = TrainingSection(epochs=1, batch_size=128, learning_rate=0.05, warmup_steps=0)
COMPILED = SETTINGS.model_copy(update={"compile": True})
TARGET = Budget("macs", 0.7)
SEED = 0


def main() -> None:
    """Time both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (
        not arguments.child
    ):  # in a process that keeps freed memory: page faults are not part of the work
        run_all("training.py", [["--data", arguments.data, "--child"]], 1)
        return
    dataset = data.load(arguments.data, seed=SEED)
    images = data.draw_calibration_images(dataset.train, STEPS * SETTINGS.batch_size, seed=SEED)
    expected = zoo.preprocessing(NETWORK)
    pixels = expected.normalise(images.read(torch.arange(len(images.labels)), expected))
    network = zoo.load(NETWORK, num_classes=len(dataset.class_names), seed=SEED)
    dependencies = build_dependency_graph(network, pixels[:1])
    plan = make_plan(l2_scores(network, dependencies), dependencies, TARGET, "l2")
    cut = apply_plan(network, dependencies, plan)
    trainings = {
        "secateur": partial(by_secateur, network, images, expected, SETTINGS),
        "bare": partial(by_bare_loop, network, pixels, images.labels),
        "cut": partial(by_secateur, cut, images, expected, SETTINGS),
        "cut, compiled": partial(by_secateur, cut, images, expected, COMPILED),
    }
    seconds = time_interleaved(trainings, pixels[:1])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "command": "python bench/training.py --data cifar10:DIR",
        "network": NETWORK,
        "steps": STEPS,
        "settings": SETTINGS.model_dump(mode="json"),
        "rounds": len(seconds["bare"]),
        "images_per_second": {
            name: round(len(pixels) / median, 1) for name, median in medians.items()
        },
        "ratio": round(medians["bare"] / medians["secateur"], 3),
        "cut_macs_left": round(dependencies.macs(plan.removed) / dependencies.macs(), 3),
        "compiled_ratio": round(medians["cut"] / medians["cut, compiled"], 2),
        "seed": SEED,
        "revision": revision(),
        "environment": surroundings("accelerate"),
    }
    write_json(RESULTS, results)
    PAGE.write_text(page(PAGE.read_text(), results))


def page(text: str, results: Row) -> str:
    """Return the page with current tables."""
    rate, place = results["images_per_second"], results["environment"]
    lines = [
        "| network | precision | threads | bare loop, images/s | secateur, images/s | ratio |",
        "|---|---|---|---|---|---|",
        f"| {results['network']} | {results['settings']['precision']} | {place['threads']} | "
        f"{rate['bare']} | {rate['secateur']} | {results['ratio']} |",
        "",
        "| network, MACs left | threads | secateur, images/s | compiled, images/s | ratio |",
        "|---|---|---|---|---|",
        f"| {results['network']}, {results['cut_macs_left']} | {place['threads']} | "
        f"{rate['cut']} | {rate['cut, compiled']} | {results['compiled_ratio']} |",
    ]
    return with_table(text, "results/training.json", "\n".join(lines))


@torch.enable_grad()
def by_secateur(
    network: nn.Module,
    images: Images,
    expected: Preprocessing,
    settings: TrainingSection,
    _: Tensor,
) -> Tensor:
    """Train one epoch with secateur's trainer."""
    train(network, None, TrainingData(images, expected), settings, seed=SEED)
    return next(network.parameters())


@torch.enable_grad()
def by_bare_loop(network: nn.Module, pixels: Tensor, labels: Tensor, _: Tensor) -> Tensor:
    """Train one epoch with the least code that does it."""
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=SETTINGS.learning_rate,
        momentum=SETTINGS.momentum,
        weight_decay=SETTINGS.weight_decay,
        nesterov=True,
    )
    network.train()
    augmentation = Augmentation()
    for indices in torch.randperm(len(labels), generator=generator).split(SETTINGS.batch_size):
        moves = augmentation.draw(len(indices), (pixels.shape[-2], pixels.shape[-1]), generator)
        images = moves.apply(pixels[indices]).contiguous(memory_format=torch.channels_last)
        optimiser.zero_grad(set_to_none=True)
        with autocast("auto"):
            logits = network(images)
        F.cross_entropy(logits.float(), labels[indices]).backward()
        optimiser.step()
    return next(network.parameters())


if __name__ == "__main__":
    main()
