"""Distillation approaches the original network or changes nothing, and uses no labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from networks import Chain, randomise_norms
from secateur.config import DistillSection, TaskKind
from secateur.data import Batch, NormalisedImages, TensorImages, batches, split_calibration
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.models.divergence import divergence_from, outputs_of
from secateur.models.task import SINGLE_LABEL
from secateur.training.distill import as_training, distill
from secateur.training.feature_distillation import observe, relative_feature_error, residual_sums
from secateur.training.outcome import Distillation
from secateur.training.training_data import TrainingData

PREPARE = Preprocessing(8, 8)


@pytest.fixture
def calibration(generator: torch.Generator) -> TensorImages:
    pixels = torch.randint(0, 256, (60, 3, 8, 8), generator=generator).to(torch.uint8)
    return TensorImages(pixels, torch.arange(60) % 5)


@pytest.fixture
def model(generator: torch.Generator) -> Chain:
    network = Chain().eval()
    randomise_norms(network, generator)
    return network


def disturbed(model: Chain, generator: torch.Generator) -> Chain:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (copied.conv1.weight, copied.conv2.weight, copied.linear.weight):
            weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=generator)
    return copied


def distilled(
    model: Chain, smaller: Chain, calibration: TensorImages, **changes: object
) -> Distillation:
    base = {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "precision": "float32"}
    settings = DistillSection.model_validate({**base, "warmup_steps": 2, "flip": False, **changes})
    fit, _ = split_calibration(calibration)
    return distill(
        model, smaller, TrainingData(fit, PREPARE), lambda: held_out(calibration), settings, seed=0
    )


def held_out(calibration: TensorImages) -> Iterator[Batch]:
    return batches(split_calibration(calibration)[1], 5, PREPARE)


def distance(model: Chain, smaller: Chain, calibration: TensorImages) -> float:
    expected = outputs_of(model, held_out(calibration))
    return divergence_from(expected, smaller, held_out(calibration), temperature=3.0).divergence


def test_outputs_approach_the_original(
    model: Chain, calibration: TensorImages, generator: torch.Generator
) -> None:
    smaller = disturbed(model, generator)
    before = distance(model, smaller, calibration)
    result = distilled(model, smaller, calibration, epochs=8)
    assert result.before.divergence == pytest.approx(before)
    assert [one.epoch.number for one in result.epochs] == list(range(1, 9))
    assert distance(model, smaller, calibration) < 0.7 * before


def test_the_last_epoch_is_kept_unless_the_divergence_grew(
    model: Chain,
    calibration: TensorImages,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = disturbed(model, generator)
    smaller = copy.deepcopy(start)
    result = distilled(model, smaller, calibration)
    divergences = [result.before.divergence, *(e.held_out.divergence for e in result.epochs)]
    assert divergences[-1] < divergences[0]
    assert result.chosen == 4
    assert distance(model, smaller, calibration) == pytest.approx(divergences[-1])
    monkeypatch.setattr("secateur.training.distill.GROWTH", -1.0)  # any divergence is too large
    smaller = copy.deepcopy(start)
    result = distilled(model, smaller, calibration, learning_rate=0.05)
    divergences = [result.before.divergence, *(e.held_out.divergence for e in result.epochs)]
    assert result.chosen == divergences.index(min(divergences))
    assert distance(model, smaller, calibration) == pytest.approx(min(divergences))


def test_weights_stay_if_no_epoch_is_better(model: Chain, calibration: TensorImages) -> None:
    smaller = copy.deepcopy(model)
    result = distilled(model, smaller, calibration, learning_rate=1.0)
    assert result.chosen == 0
    assert all(torch.equal(model.state_dict()[n], t) for n, t in smaller.state_dict().items())


def test_tensors_keep_their_sides(model: Chain, generator: torch.Generator) -> None:
    images = NormalisedImages(torch.rand(8, 3, 80, 120, generator=generator), torch.zeros(8).long())
    smaller, shapes = copy.deepcopy(model), []
    smaller.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[1:])))
    prepare = Preprocessing(80, 80)
    settings = DistillSection(epochs=1, batch_size=8, precision="float32")
    data = TrainingData(images, prepare)
    distill(model, smaller, data, lambda: batches(images, 8, prepare), settings, seed=0)
    assert set(shapes) == {(3, 80, 120)}


def test_labels_do_not_matter(
    model: Chain, calibration: TensorImages, generator: torch.Generator
) -> None:
    one = disturbed(model, generator)
    other = copy.deepcopy(one)
    strange = TensorImages(calibration.pixels, calibration.labels + 100)
    assert distilled(model, one, calibration) == distilled(model, other, strange)
    assert all(torch.equal(one.state_dict()[n], t) for n, t in other.state_dict().items())


def test_batchnorm_statistics_and_the_original_stay(
    model: Chain, calibration: TensorImages, generator: torch.Generator
) -> None:
    smaller = disturbed(model, generator).train()
    before, original = copy.deepcopy(smaller.state_dict()), copy.deepcopy(model.state_dict())
    result = distilled(model, smaller, calibration)
    assert result.chosen > 0
    assert smaller.training
    for name, tensor in smaller.state_dict().items():
        is_statistic = name.rpartition(".")[2] in {
            *("running_mean", "running_var", "num_batches_tracked")
        }
        assert torch.equal(before[name], tensor) == is_statistic, name
    assert all(torch.equal(original[n], t) for n, t in model.state_dict().items())
    assert not model.training


class Block(nn.Module):
    """A residual block whose sum is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(self.norm(self.conv1(x)).relu())
        return x + residual


def test_feature_maps_approach_the_original(
    calibration: TensorImages, generator: torch.Generator
) -> None:
    stem, head = nn.Conv2d(3, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(stem, Block(), head, nn.Linear(4, 5)).eval()
    randomise_norms(model, generator)
    images = next(held_out(calibration)).images
    sums = residual_sums(build_dependency_graph(model, images), {})
    assert [one.module for one in sums] == ["1"]

    def error(weight: float) -> float:
        smaller = copy.deepcopy(model)
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in smaller[1].parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
        settings = DistillSection(
            epochs=6, batch_size=16, learning_rate=0.01, precision="float32", feature_weight=weight
        )
        data = TrainingData(split_calibration(calibration)[0], PREPARE)
        distill(model, smaller, data, lambda: held_out(calibration), settings, seed=0, sums=sums)
        with torch.no_grad(), observe(smaller, sums) as maps, observe(model, sums) as original:
            smaller(images)
            model(images)
        return float(relative_feature_error(sums, maps.by_module, original.by_module))

    assert error(10.0) < 0.7 * error(0.0)


@pytest.mark.parametrize(
    ("kind", "mixup"),
    [("single-label", 0.5), ("binary", 0.5), ("multi-label", 0), ("detection", 0)],
)
def test_only_images_with_a_class_each_are_mixed(kind: TaskKind, mixup: float) -> None:
    settings = DistillSection(mixup=0.5)
    training = as_training(settings, replace(SINGLE_LABEL, kind=kind), has_features=True)
    assert training.mixup == mixup
    assert training.feature_weight == settings.feature_weight > 0
    assert as_training(settings, SINGLE_LABEL).feature_weight == 0  # no residual sums
