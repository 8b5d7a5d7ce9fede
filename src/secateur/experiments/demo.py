"""The demonstration: train a small network on data that a dependency ships, then prune it."""

from __future__ import annotations

from pathlib import Path

from secateur import data
from secateur.config import RunConfig, TrainingSection, from_dict
from secateur.models import zoo
from secateur.pipeline.inputs import preprocessing_of
from secateur.pipeline.run_context import RunContext
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import make_folder, replace_file
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData

MODEL = "resnet20"
TRAINING = TrainingSection(epochs=8, batch_size=64, learning_rate=0.1, warmup_steps=40, flip=False)
"""How the base network is trained on the digits."""


def digits_config(weights: Path) -> RunConfig:
    """Return the configuration of the demonstration: half of the MACs, 500 calibration images."""
    return from_dict(
        {
            "model": {"name": MODEL, "weights": str(weights)},
            "data": {"source": "digits", "calibration_images": 500},
            "plan": {"target": "macs=0.5"},
            "finetune": {"epochs": 3, "batch_size": 64, "warmup_steps": 10, "flip": False},
        },
        RunConfig,
    )


def train_digits(weights: Path, run_context: RunContext | None = None) -> None:
    """Train a ResNet-20 on the digits and write its weights as safetensors."""
    run_context = run_context or RunContext()
    config = digits_config(weights)
    dataset = data.load("digits", seed=config.seed)
    model = zoo.load(MODEL, num_classes=len(dataset.class_names), seed=config.seed)
    train(
        model,
        None,
        TrainingData(dataset.train, preprocessing_of(config)),
        TRAINING,
        seed=config.seed,
        callbacks=TrainingCallbacks(run_context.progress, lines=run_context.lines),
    )
    make_folder(weights.parent)
    replace_file(weights, safetensors_io.to_bytes(model.state_dict()))
