"""Training: what it learns, what it leaves alone, and that it can be repeated."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from networks import Chain, randomise_norms
from secateur.config import FinetuneSection
from secateur.data import Batch, TensorImages
from secateur.errors import DataError, SecateurError
from secateur.finetune import Epoch, _cosine, _loss, finetune
from secateur.models import Preprocessing
from secateur.precision import autocast, has_fast_bfloat16

PREPARE = Preprocessing(8, 8)


@pytest.fixture
def images(generator: torch.Generator) -> TensorImages:
    """Sixty images whose class is told by their brightness."""
    labels = torch.arange(60) % 5
    noise = torch.randint(0, 30, (60, 3, 8, 8), generator=generator)
    pixels = (noise + 45 * labels[:, None, None, None]).to(torch.uint8)
    return TensorImages(pixels, labels)


def settings(**changes: object) -> FinetuneSection:
    base = {"epochs": 3, "batch_size": 16, "warmup_steps": 2, "precision": "float32"}
    return FinetuneSection.model_validate({**base, **changes})


def trained(
    model: Chain,
    teacher: Chain | None,
    images: TensorImages,
    section: FinetuneSection,
    seed: int = 0,
) -> tuple[Chain, list[Epoch]]:
    epochs: list[Epoch] = []
    copied = copy.deepcopy(model)
    finetune(copied, teacher, images, PREPARE, section, seed=seed, after_epoch=epochs.append)
    return copied, epochs


def is_equal(one: Chain, other: Chain) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


def test_loss_falls_and_every_epoch_is_told_of(images: TensorImages) -> None:
    _, epochs = trained(Chain(), None, images, settings(epochs=6, learning_rate=0.1))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert epochs[-1].learning_rate == pytest.approx(0, abs=1e-6)


def test_same_seed_gives_the_same_weights(images: TensorImages) -> None:
    model = Chain()
    one, _ = trained(model, None, images, settings())
    same, _ = trained(model, None, images, settings())
    other, _ = trained(model, None, images, settings(), seed=1)
    assert is_equal(one, same)
    assert not is_equal(one, other)


def test_teacher_is_left_alone_and_learnt_from(
    images: TensorImages, generator: torch.Generator
) -> None:
    teacher = Chain().train()
    randomise_norms(teacher, generator)
    before = copy.deepcopy(teacher)
    _, epochs = trained(
        Chain(), teacher, images, settings(epochs=8, label_weight=0.0, learning_rate=0.1)
    )
    assert is_equal(teacher, before)
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert epochs[-1].loss < epochs[0].loss


def test_without_label_weight_labels_do_not_matter(images: TensorImages) -> None:
    model, teacher = Chain(), Chain()
    wrong = TensorImages(images.pixels, images.labels.flip(0))
    one, _ = trained(model, teacher, images, settings(label_weight=0.0))
    other, _ = trained(model, teacher, wrong, settings(label_weight=0.0))
    with_labels, _ = trained(model, teacher, wrong, settings(label_weight=0.5))
    assert is_equal(one, other)
    assert not is_equal(one, with_labels)


def test_loss_is_the_weighted_sum_of_its_parts(generator: torch.Generator) -> None:
    model, teacher = Chain().eval(), Chain().eval()
    batch = Batch(torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 5, torch.arange(6))
    temperature, weight = 2.5, 0.3
    section = settings(temperature=temperature, label_weight=weight)
    loss = _loss(model, teacher, batch, weight, section)
    student, taught = model(batch.images), teacher(batch.images)
    p, q = (F.softmax(t / temperature, dim=1) for t in (taught, student))
    divergence = (p * (p / q).log()).sum(1).mean() * temperature**2
    expected = weight * F.cross_entropy(student, batch.labels) + (1 - weight) * divergence
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_copy_of_the_teacher_has_nothing_to_learn(generator: torch.Generator) -> None:
    model = Chain().eval()
    images, numbers = torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6)
    batch = Batch(images, torch.zeros(6, dtype=torch.int64), numbers)
    loss = _loss(model, copy.deepcopy(model), batch, 0.0, settings())
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_every_optimiser_learns(images: TensorImages, optimiser: str) -> None:
    section = settings(epochs=6, learning_rate=0.05, optimiser=optimiser)
    model, epochs = trained(Chain(), None, images, section)
    other, _ = trained(Chain(), None, images, settings(epochs=6, learning_rate=0.05))
    assert epochs[-1].loss < 0.8 * epochs[0].loss
    assert not is_equal(model, other)


def test_statistics_of_norms_move_in_training_mode_only(images: TensorImages) -> None:
    model = Chain()
    for mode, is_fixed in (("training", False), ("evaluation", True)):
        moved, _ = trained(model, None, images, settings(mode=mode))
        name = "bn1.running_mean"
        assert torch.equal(moved.state_dict()[name], model.state_dict()[name]) == is_fixed
        assert not torch.equal(moved.conv1.weight, model.conv1.weight)
        assert moved.training


def test_mode_comes_back(images: TensorImages) -> None:
    model = Chain().eval()
    model.bn1.train()
    finetune(model, None, images, PREPARE, settings(epochs=1), seed=0)
    assert (model.training, model.bn1.training, model.bn2.training) == (False, True, False)


def test_schedule_rises_then_falls_to_zero() -> None:
    factor = _cosine(steps=100, warmup=10)
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == factor(10) == pytest.approx(1)
    assert factor(55) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert all(factor(s) >= factor(s + 1) for s in range(10, 100))
    assert math.isfinite(_cosine(steps=1, warmup=10)(0))


def test_loss_that_explodes_is_an_error(images: TensorImages) -> None:
    with pytest.raises(SecateurError, match="smaller learning rate"):
        finetune(Chain(), None, images, PREPARE, settings(learning_rate=1e20), seed=0)


def test_label_outside_the_head_is_an_error(images: TensorImages) -> None:
    wrong = TensorImages(images.pixels, images.labels + 3)
    with pytest.raises(DataError, match="tells 5 classes apart"):
        finetune(Chain(), None, wrong, PREPARE, settings(), seed=0)


def test_precision_is_what_was_asked_for() -> None:
    product = torch.nn.Linear(4, 4)
    expected = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "auto": torch.bfloat16 if has_fast_bfloat16() else torch.float32,
    }
    with autocast("float32"):
        assert product(torch.ones(1, 4)).dtype == expected["float32"]
    with autocast("bfloat16"):
        assert product(torch.ones(1, 4)).dtype == expected["bfloat16"]
    with autocast("auto"):
        assert product(torch.ones(1, 4)).dtype == expected["auto"]
