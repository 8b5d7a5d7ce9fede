"""The main job on data that ships with a dependency: train a small network, then prune it."""

from __future__ import annotations

from pathlib import Path

from secateur import data
from secateur.config import RunConfig, TrainingSection, from_dict
from secateur.models import zoo
from secateur.pipeline.prune import preprocessing
from secateur.runtime import safetensors_io
from secateur.runtime.atomic_io import make_folder, replace_file
from secateur.runtime.progress import ProgressCallback, no_progress
from secateur.training.trainer import TrainingCallbacks, train
from secateur.training.training_data import TrainingData

MODEL = "resnet20"
TRAINING = TrainingSection(epochs=8, batch_size=64, learning_rate=0.1, warmup_steps=40, flip=False)
"""How the base network is trained on the digits."""


def digits_config(weights: Path) -> RunConfig:
    """The demonstration's run: half of the MACs, scored with 500 of the digits."""
    return from_dict(
        {
            "model": {"name": MODEL, "weights": str(weights)},
            "data": {"source": "digits", "calibration_images": 500},
            "plan": {"target": "macs=0.5"},
            "finetune": {"epochs": 3, "batch_size": 64, "warmup_steps": 10, "flip": False},
        },
        RunConfig,
    )


def train_digits(weights: Path, progress: ProgressCallback = no_progress) -> None:
    """Trains a ResNet-20 on the digits and writes its weights as safetensors."""
    config = digits_config(weights)
    dataset = data.load("digits", seed=config.seed)
    model = zoo.load(MODEL, num_classes=len(dataset.class_names), seed=config.seed)
    train(
        model,
        None,
        TrainingData(dataset.train, preprocessing(config)),
        TRAINING,
        seed=config.seed,
        callbacks=TrainingCallbacks(progress),
    )
    make_folder(weights.parent)
    replace_file(weights, safetensors_io.to_bytes(model.state_dict()))
