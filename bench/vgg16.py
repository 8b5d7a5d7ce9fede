"""Trains a base VGG-16-BN for CIFAR-10, since no published weights are at hand.

    python bench/vgg16.py --data cifar10:DIR --out runs/vgg16 --epochs 12

A short schedule: good enough to prune, not to compare with published base networks. After every
epoch `OUT/vgg16_bn.safetensors` is written, and beside it `vgg16_bn.json` with the validation
accuracy, the seed, the schedule and the versions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from rows import revision, surroundings
from secateur import data, models
from secateur.config import TrainingSection
from secateur.evaluate import evaluate
from secateur.training import Epoch, train


def main() -> None:
    """Trains, and keeps the last epoch's weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="cifar10:DIR")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    dataset = data.load(arguments.data, validation_fraction=0.1, seed=arguments.seed)
    model = models.load("vgg16_bn", None, num_classes=10, seed=arguments.seed)
    expected = models.preprocessing("vgg16_bn")
    settings = TrainingSection(epochs=arguments.epochs, learning_rate=0.05)

    def keep(epoch: Epoch) -> None:
        score = evaluate(model, data.batches(dataset.validation, 100, expected))
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, arguments.out / "vgg16_bn.safetensors")
        facts = {
            "command": f"python bench/vgg16.py --data cifar10:DIR --epochs {arguments.epochs}",
            "seed": arguments.seed,
            "epoch": epoch.number,
            "loss": epoch.loss,
            "validation_top1_fraction": score.top1_fraction,
            "schedule": settings.model_dump(),
            "revision": revision(),
            "environment": surroundings(),
        }
        (arguments.out / "vgg16_bn.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(epoch.number, epoch.loss, score.top1_fraction, flush=True)

    train(
        model.to(memory_format=torch.channels_last),
        None,
        dataset.train,
        expected,
        settings,
        seed=arguments.seed,
        after_epoch=keep,
    )


if __name__ == "__main__":
    main()
