"""One short real run on the digits, shared by every test of run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from secateur import data
from secateur.config import RunConfig, TrainingSection, from_dict
from secateur.experiments.run import run
from secateur.models import zoo
from secateur.pipeline.result import RunResult
from secateur.pipeline.run_context import RunContext
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData


@dataclass(frozen=True)
class DigitsRun:
    """A run folder and what it was made from."""

    folder: Path
    config: RunConfig
    result: RunResult


def small_config(model_file: Path, **sections: Mapping[str, object]) -> RunConfig:
    """A run of the small network on digits that takes a second or two."""
    tables: dict[str, dict[str, object]] = {
        "model": {"name": f"{model_file}:small", "allow_untrained": True},
        "data": {
            "source": "digits",
            "image_size": 32,
            "calibration_images": 100,
            "batch_size": 50,
            "synthetic_images": 0,
        },
        "finetune": {"epochs": 0, "batch_size": 64, "warmup_steps": 0, "flip": False},
        "report": {"images": 0},  # a third of the time of such a run is its gallery
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    return from_dict(dict(tables), RunConfig)


def make_digits_run(directory: Path) -> DigitsRun:
    """Trains a ResNet-20 on the digits for two epochs and prunes it to half its MACs."""
    weights = directory / "base.safetensors"
    dataset = data.load("digits")
    model = zoo.load("resnet20")
    settings = TrainingSection(
        epochs=2, batch_size=32, learning_rate=0.1, warmup_steps=10, flip=False
    )
    prepare = zoo.preprocessing("resnet20")
    train(model, None, TrainingData(dataset.train, prepare), settings, seed=0)
    save_file(model.state_dict(), weights)
    config = from_dict(
        {
            "model": {"name": "resnet20", "weights": str(weights)},
            "data": {"source": "digits", "calibration_images": 100},
            "plan": {"target": "macs=0.5"},
            "finetune": {"epochs": 1, "batch_size": 64, "warmup_steps": 5, "flip": False},
        },
        RunConfig,
    )
    folder = directory / "run"
    result = run(config, folder, RunContext(command="secateur prune <script>alert(1)</script>"))
    return DigitsRun(folder, config, result)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Return the outputs of a network for four fixed images."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(images)
    return logits
