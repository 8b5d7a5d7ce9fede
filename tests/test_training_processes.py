"""Training in several processes, and in ones that are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import Chain
from processes import context, in_group
from secateur.config import TrainingSection
from secateur.data import TensorImages
from secateur.data.preprocessing import Preprocessing
from secateur.runtime.distributed import (
    all_reduce_sum,
    barrier,
    is_main_process,
    rank_and_world_size,
)
from secateur.training.checkpoint import Checkpoints
from secateur.training.sync_batchnorm import sync_batchnorm
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData

STEPS = 2


def small_images(count: int) -> TensorImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    noise = torch.randint(0, 30, (count, 3, 8, 8), generator=generator)
    return TensorImages((noise + 45 * labels[:, None, None, None]).to(torch.uint8), labels)


def settings(**changes: object) -> TrainingSection:
    base = {"epochs": 1, "batch_size": 30, "warmup_steps": 0, "precision": "float32"}
    return TrainingSection.model_validate({**base, "learning_rate": 0.05, **changes})


def weights_after(
    count: int, changes: Mapping[str, object], folder: Path | None = None
) -> dict[str, Tensor]:
    """The weights after training, and as `loss` the loss of the last epoch."""
    torch.manual_seed(0)
    model = Chain()
    training = train(
        model,
        None,
        TrainingData(small_images(count), Preprocessing(8, 8)),
        settings(**changes),
        seed=0,
        checkpoints=None if folder is None else Checkpoints(folder),
    )
    return {**model.state_dict(), "loss": torch.tensor(training.epochs[-1].loss)}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_batch_may_be_sharded(size: int) -> None:
    """Two steps with batch norm over all processes; the second batch is not full."""
    for changes in ({}, {"gradient_accumulation_steps": 2, "freeze_batchnorm": True}):
        alone = weights_after(51, {**changes})
        for sharded in in_group(weights_after, size, 51, {**changes}):
            for name, expected in alone.items():
                difference = (sharded[name].double() - expected.double()).abs().max()
                assert difference < 1e-5, name


def test_processes_agree_without_sync_batchnorm() -> None:
    changes = {"sync_batchnorm": False}
    one, other = in_group(weights_after, 2, 60, changes)
    alone = weights_after(60, changes)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.allclose(one["bn1.running_mean"], alone["bn1.running_mean"])


class NormThenRectifier(nn.BatchNorm2d):
    """A subclass of batch norm that adds an activation, as timm's do."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values).relu()


def normalised(momentum: float | None) -> dict[str, Tensor]:
    """The outputs and statistics of a batch norm in training mode, over all processes."""
    torch.manual_seed(0)
    images = torch.randn(10, 3, 4, 4)
    rank, processes = rank_and_world_size()
    norm = NormThenRectifier(3, momentum=momentum)
    with sync_batchnorm(norm):
        outputs = norm(images[rank::processes])
    whole = torch.zeros(10, 3, 4, 4)
    whole[rank::processes] = outputs.detach()
    all_reduce_sum([whole])
    return {**norm.state_dict(), "outputs": whole}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_sync_batchnorm_keeps_what_a_subclass_adds(momentum: float | None) -> None:
    alone = normalised(momentum)
    assert (alone["outputs"] == 0).any()
    for sharded in in_group(normalised, 2, momentum):
        for name, expected in alone.items():
            assert torch.allclose(sharded[name], expected, atol=1e-6), name


def loss_when_resumed(folder: Path) -> Tensor:
    """The loss of an epoch that is resumed in its middle."""
    changes = {"checkpoint_minutes": 0}
    weights_after(60, changes, folder)
    if is_main_process():
        newest = max(folder.iterdir(), key=lambda path: path.name)
        newest.unlink()
    barrier()
    return weights_after(60, changes, folder)["loss"]


def test_the_loss_of_a_resumed_epoch_is_a_mean(tmp_path: Path) -> None:
    """Of the first process's images before, and those of all after the interruption."""
    expected = weights_after(60, {})["loss"]
    for number, loss in enumerate(in_group(loss_when_resumed, 2, tmp_path)):
        assert loss == pytest.approx(float(expected), rel=0.1), number


LONG = {"epochs": 40, "batch_size": 8, "checkpoint_minutes": 0, "ema_decay": 0.9, "cutmix": 1.0}


def train_and_store(folder: Path) -> None:
    torch.set_num_threads(1)
    weights = weights_after(64, LONG, folder / "checkpoints")
    torch.save(weights, folder / "unfinished")
    (folder / "unfinished").rename(folder / "weights.pt")


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_at_random_moments_ends_with_the_same_weights(
    tmp_path: Path, times: int
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    whole = context().Process(target=train_and_store, args=(alone,))  # type: ignore[attr-defined]
    whole.start()
    whole.join()
    draw = random.Random(0)
    kills = 0
    while not (killed / "weights.pt").exists():
        before = newest(killed)
        process = context().Process(target=train_and_store, args=(killed,))  # type: ignore[attr-defined]
        process.start()
        while kills < times and process.is_alive() and newest(killed) == before:
            time.sleep(0.001)
        if kills < times:
            time.sleep(draw.uniform(0, 0.05))
            process.kill()
            kills += 1
        process.join()
    assert kills == times
    one, other = (
        torch.load(folder / "weights.pt", weights_only=True) for folder in (alone, killed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def newest(folder: Path) -> str:
    return max((path.name for path in (folder / "checkpoints").glob("*.safetensors")), default="")
