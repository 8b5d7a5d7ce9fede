"""A loss of the user's takes the place of the task's; what is wrong with it is said in a line."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from networks import Chain
from secateur.config import BaseConfig, RunConfig, TrainingSection, from_dict
from secateur.data import NormalisedImages
from secateur.data.augmentation import Augmentation
from secateur.data.images import IGNORED
from secateur.data.objects import Objects
from secateur.data.preprocessing import Preprocessing
from secateur.experiments import run as runs
from secateur.experiments.train_base import train_base
from secateur.graph.output_values import OutputPart
from secateur.models.task import SINGLE_LABEL, Task
from secateur.runtime.errors import DataError, NotFiniteLoss, SecateurError, UsageError
from secateur.runtime.precision import accelerator_for
from secateur.training.loss import DistillationLoss
from secateur.training.own_loss import OwnLoss, find_loss
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData, training_stream

PREPARE = Preprocessing(8, 8)
DETECTION = Task("detection", parts=(OutputPart(),))
REGRESSION = Task("regression", parts=(OutputPart(),))
SECTION = TrainingSection(epochs=1, batch_size=10, warmup_steps=0, precision="float32")


def images(count: int = 20) -> NormalisedImages:
    generator = torch.Generator().manual_seed(0)
    return NormalisedImages(
        torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 5
    )


def section(**changes: object) -> TrainingSection:
    return SECTION.model_copy(update=changes)


def loss_of(
    function: Callable[..., Any],
    labels: Tensor,
    *,
    task: Task = SINGLE_LABEL,
    teacher: nn.Module | None = None,
    targets: tuple[Objects, ...] | None = None,
    **changes: object,
) -> Tensor:
    torch.manual_seed(0)
    settings = section(**changes)
    loss = DistillationLoss(
        Chain(),
        teacher,
        settings,
        accelerator_for("float32"),
        task=task,
        own_loss=OwnLoss(function),
    )
    return loss.loss(images(len(labels)).tensors[:], labels, targets)


def test_it_gets_what_the_network_returns_and_the_labels() -> None:
    seen = []

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        seen.append((output.shape, labels))
        return output.square().mean()

    labels = torch.arange(6) % 5
    loss_of(loss, labels)
    (shape, seen_labels), *_ = seen
    assert shape == (6, 5)
    assert torch.equal(seen_labels, labels)


def test_it_has_the_weight_of_the_labels() -> None:
    labels = torch.arange(6) % 5
    torch.manual_seed(1)
    teacher = Chain()

    def weighted(weight: float) -> float:
        return float(
            loss_of(F.cross_entropy, labels, teacher=teacher, label_weight=weight).detach()
        )

    assert weighted(0.25) == pytest.approx(0.25 * weighted(1) + 0.75 * weighted(0), rel=1e-5)


def test_detectors_get_objects() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4]])
    objects = tuple(
        Objects(boxes * number, torch.tensor([number]), torch.tensor([False]), boxes[:, 2], (8, 8))
        for number in (1, 2)
    )

    def loss(output: Tensor, targets: tuple[Objects, ...]) -> Tensor:
        wanted = torch.stack([one.boxes_in_input().mean() for one in targets])
        return (output.mean(1) - wanted).square().mean()

    assert loss_of(loss, torch.zeros(2).long(), task=DETECTION, targets=objects) > 1


WRONG = {
    "nothing": (lambda output, labels: None, "returned NoneType"),
    "a number": (lambda output, labels: 0.5, "returned float"),
    "one an image": (
        lambda output, labels: F.cross_entropy(output, labels, reduction="none"),
        re.escape("returned [6] of float32"),
    ),
    "whole numbers": (lambda output, labels: labels.sum(), "of int64"),
    "without a gradient": (
        lambda output, labels: (output.argmax(1) != labels).float().mean(),
        "without a gradient",
    ),
    "an error": (lambda output, labels: output + labels, "failed on .*: RuntimeError: The size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_it_is_said_in_one_line(name: str) -> None:
    function, message = WRONG[name]
    with pytest.raises(UsageError, match=message) as error:
        loss_of(function, torch.arange(6) % 5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "function",
    [lambda output: output.mean(), nn.CrossEntropyLoss, "cross_entropy"],
    ids=["one argument", "a class", "a text"],
)
def test_it_must_take_two_arguments(function: Any) -> None:
    with pytest.raises(UsageError, match=re.escape("loss(output, labels)")):
        OwnLoss(function)


def test_errors_of_secateur_stay_what_they_are() -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        raise DataError("no mask")

    with pytest.raises(DataError, match="no mask"):
        loss_of(loss, torch.arange(6) % 5)


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    own_loss = OwnLoss(lambda output, labels: output.mean() / 0)
    with pytest.raises(NotFiniteLoss, match="became"):
        train(Chain(), None, TrainingData(images(), PREPARE, own_loss=own_loss), SECTION, seed=0)


def test_it_needs_labels_and_no_smoothing() -> None:
    labels = torch.zeros(4).long()
    with pytest.raises(UsageError, match="needs labels"):
        loss_of(F.cross_entropy, labels, task=Task(has_labels=False))
    with pytest.raises(UsageError, match="label_smoothing"):
        loss_of(F.cross_entropy, labels, label_smoothing=0.1)


def test_it_trains_detectors_which_have_no_loss_otherwise() -> None:
    data = TrainingData(images(), PREPARE, task=DETECTION)
    with pytest.raises(UsageError, match=r"train\.loss"):
        train(Chain(), None, data, SECTION, seed=0)
    model = Chain()
    before = copy.deepcopy(model)
    data = TrainingData(
        images(),
        PREPARE,
        task=DETECTION,
        own_loss=OwnLoss(lambda output, labels: output.square().mean()),
    )
    train(model, None, data, SECTION, seed=0)
    assert not torch.equal(model.conv1.weight, before.conv1.weight)


def test_accumulation_leaves_the_mean_as_it_is() -> None:
    def trained(parts: int) -> Tensor:
        torch.manual_seed(0)
        model = Chain()
        settings = section(gradient_accumulation_steps=parts, freeze_batchnorm=True)
        data = TrainingData(images(), PREPARE, own_loss=OwnLoss(F.cross_entropy))
        train(model, None, data, settings, seed=0)
        return model.conv1.weight.detach()

    assert torch.allclose(trained(3), trained(1), atol=1e-6)


# --- names --------------------------------------------------------------------------------------


def test_it_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "losses.py"
    path.write_text("def focal(output, labels):\n    return output.mean()\n")
    own_loss = find_loss(f"{path}:focal")
    assert own_loss is not None
    assert own_loss.name == "focal"
    assert find_loss("auto") is None
    with pytest.raises(UsageError, match="no file"):
        find_loss(f"{tmp_path}/none.py:focal")
    with pytest.raises(UsageError, match="neither auto nor"):
        find_loss("focal")
    with pytest.raises(UsageError, match="pass it again"):
        find_loss("memory:focal")


def test_prune_trains_with_it_and_keeps_its_name() -> None:
    calls = []

    def focal(output: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(output))
        rows = F.cross_entropy(output, labels, reduction="none")
        return ((1 - (-rows).exp()) * rows).mean()

    data = images(40)
    pruned = secateur.prune(
        Chain().eval(), (data.tensors, data.labels), target=0.6, epochs=1, loss=focal
    )
    assert calls
    assert pruned.result.config.finetune.loss == "memory:focal"
    assert "finetuned" in pruned.scores


@pytest.mark.parametrize("epochs", [0, 1])
def test_prune_says_what_is_wrong_with_it_at_once(epochs: int) -> None:
    data = images(40)
    loss: Any = F.cross_entropy if epochs == 0 else nn.CrossEntropyLoss
    message = "pass epochs" if epochs == 0 else re.escape("loss(output, labels)")
    with pytest.raises(SecateurError, match=message):
        secateur.prune(Chain(), (data.tensors, data.labels), epochs=epochs, loss=loss)


# --- labels that images are changed with --------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        (SINGLE_LABEL, {}, Augmentation("random_crop", flip=True)),
        (Task("segmentation"), {}, Augmentation("random_crop", flip=True)),
        (REGRESSION, {}, Augmentation("none", flip=False)),
        (REGRESSION, {"label_weight": 0.0}, Augmentation("random_crop", flip=True)),
        (REGRESSION, {"flip": True}, Augmentation("none", flip=True)),
        (DETECTION, {}, Augmentation("random_crop", flip=True)),
        (SINGLE_LABEL, {"flip": False}, Augmentation("random_crop", flip=False)),
    ],
)
def test_by_default_images_move_where_their_labels_stay_true(
    task: Task, changes: dict[str, object], expected: Augmentation
) -> None:
    stream = training_stream(TrainingData(images(), PREPARE, task=task), section(**changes), 0)
    assert stream.augmentation == expected


def test_with_a_loss_of_ones_own_objects_stay_where_they_are() -> None:
    data = TrainingData(images(), PREPARE, task=DETECTION, own_loss=OwnLoss(F.mse_loss))
    assert training_stream(data, SECTION, 0).augmentation == Augmentation("none", flip=False)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("crop", ["none", "random_crop"])
def test_pictures_and_masks_move_with_their_images(scale: int, crop: Any) -> None:
    pictures = torch.rand(30, 3, 8, 8) + 1
    generator = torch.Generator().manual_seed(0)
    moves = Augmentation(crop, flip=True).draw(30, (8, 8), generator)
    moved = moves.apply(pictures)
    labels = F.interpolate(pictures, scale_factor=scale, mode="nearest")
    expected = F.interpolate(moved, scale_factor=scale, mode="nearest")
    assert torch.equal(moves.apply_to_labels(labels, pictures), expected)
    masks = moves.apply_to_labels((labels[:, 0] * 10).long(), pictures)
    assert torch.equal(
        masks, torch.where(expected[:, 0] == 0, IGNORED, (expected[:, 0] * 10).long())
    )


def test_smaller_pictures_are_flipped_and_cannot_be_shifted() -> None:
    pictures, labels = torch.rand(9, 3, 8, 8), torch.rand(9, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    flips = Augmentation("none", flip=True).draw(9, (8, 8), generator)
    moved = flips.apply_to_labels(labels, pictures)
    assert flips.flipped.any()
    assert torch.equal(moved[flips.flipped[:, 0]], labels[flips.flipped[:, 0]].flip(-1))
    shifts = Augmentation("random_crop").draw(9, (8, 8), generator)
    with pytest.raises(DataError, match="crop"):
        shifts.apply_to_labels(labels, pictures)
    points = torch.rand(9, 5, 2)
    assert torch.equal(shifts.apply_to_labels(points, pictures), points)


# --- the command line ---------------------------------------------------------------------------


def test_a_run_is_trained_with_it_and_asks_for_it_again(model_file: Path, tmp_path: Path) -> None:
    model_file.write_text(
        f"{model_file.read_text()}\n\ndef half(output, labels):\n"
        "    return nn.functional.cross_entropy(output, labels) / 2\n"
    )
    network, loss = f"{model_file}:small", f"{model_file}:half"
    config = from_dict(
        {
            "model": {"name": network, "allow_untrained": True},
            "data": {"source": "digits", "image_size": 32, "calibration_images": 60},
            "score": {"criterion": "l1"},
            "finetune": {"epochs": 1, "loss": loss, "batch_size": 512},
            "report": {"images": 0},
        },
        RunConfig,
    )
    folder = tmp_path / "run"
    result = runs.run(config, folder)
    assert result.config.finetune.loss == loss
    named = {"model.name": network}
    with pytest.raises(UsageError, match=re.escape(f"--set finetune.loss={loss}")):
        runs.finetune(folder, folder, {}, named=named)
    tuned = runs.finetune(folder, tmp_path / "other", {"loss": "auto"}, named=named)
    with_auto, with_half = (r.finetuning.epochs[0].loss for r in (tuned, result) if r.finetuning)
    assert with_half < with_auto
    with pytest.raises(UsageError, match="no file"):
        runs.run(
            from_dict({**config.model_dump(), "finetune": {"loss": "a.py:b"}}, RunConfig), folder
        )


def test_a_base_network_is_trained_with_it(tmp_path: Path, model_file: Path) -> None:
    model_file.write_text(
        f"{model_file.read_text()}\n\ndef zero(output, labels):\n    return 0 * output.mean()\n"
    )
    config = from_dict(
        {
            "model": {"name": f"{model_file}:small"},
            "data": {"source": "digits", "image_size": 32},
            "train": {"epochs": 1, "loss": f"{model_file}:zero", "batch_size": 512},
        },
        BaseConfig,
    )
    assert train_base(config, tmp_path / "base").epochs[0].loss == 0
