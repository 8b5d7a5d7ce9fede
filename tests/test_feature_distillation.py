"""Residual sums are found with their kept channels, and a student learns its teacher's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.config import Budget, TrainingSection
from secateur.data import TensorImages
from secateur.data.preprocessing import Preprocessing
from secateur.graph.build import build_dependency_graph
from secateur.models import zoo
from secateur.pruning.apply import apply_plan
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import UsageError
from secateur.training.feature_distillation import observe, relative_feature_error, residual_sums
from secateur.training.trainer import train
from secateur.training.training_data import TrainingData

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
EXAMPLE = torch.zeros(2, 3, 32, 32)


@pytest.fixture
def network() -> nn.Module:
    return zoo.load("resnet20", num_classes=10).eval()


def test_every_block_of_a_residual_network_has_a_sum(network: nn.Module) -> None:
    sums = residual_sums(build_dependency_graph(network, EXAMPLE), {})
    assert [one.module for one in sums] == BLOCKS
    assert [len(one.kept) for one in sums] == 3 * [16] + 3 * [32] + 3 * [64]


def test_removed_channels_are_not_kept(network: nn.Module) -> None:
    dependencies = build_dependency_graph(network, EXAMPLE, prune_residual=True)
    sums = residual_sums(dependencies, dict.fromkeys(dependencies.groups, (0, 5)))
    # Later stages pad the first stage's channels with zeros on both sides.
    for one in sums:
        stage = int(one.module[len("layer")])
        width, offset = {1: (16, 0), 2: (32, 8), 3: (64, 24)}[stage]
        removed = {offset, offset + 5}
        assert one.kept == tuple(number for number in range(width) if number not in removed)


def test_the_error_is_that_of_the_kept_channels(
    network: nn.Module, generator: torch.Generator
) -> None:
    dependencies = build_dependency_graph(network, EXAMPLE, prune_residual=True)
    removed: dict[str, tuple[int, ...]] = dict.fromkeys(dependencies.groups, (0, 1))
    plan = PruningPlan(removed, Budget("filters", 0.9), "l1")
    smaller = apply_plan(network, dependencies, plan).eval()
    sums = residual_sums(dependencies, removed)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    with torch.inference_mode(), observe(smaller, sums) as maps, observe(network, sums) as original:
        smaller(images)
        network(images)
    error = relative_feature_error(sums, maps.by_module, original.by_module)
    errors = []
    for one in sums:
        target = original.by_module[one.module][:, list(one.kept)]
        errors.append(((maps.by_module[one.module] - target) ** 2).sum() / (target**2).sum())
    assert float(error) == pytest.approx(float(sum(errors)) / len(errors), rel=1e-4)
    assert not network._forward_hooks
    assert not network.get_submodule(BLOCKS[0])._forward_hooks


def test_a_student_learns_the_feature_maps_of_its_teacher(
    network: nn.Module, generator: torch.Generator
) -> None:
    pixels = torch.randint(256, (64, 3, 32, 32), generator=generator).to(torch.uint8)
    images = TensorImages(pixels, torch.zeros(64, dtype=torch.int64))
    data = TrainingData(images, Preprocessing(32, 32))
    sums = residual_sums(build_dependency_graph(network, EXAMPLE), {})
    settings = TrainingSection(
        epochs=3,
        batch_size=16,
        warmup_steps=0,
        label_weight=0.0,
        feature_weight=1.0,
        learning_rate=0.002,
        freeze_batchnorm=True,
        precision="float32",
    )
    student = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    training = train(student, network, data, settings, seed=0, sums=sums)
    assert training.epochs[-1].loss < 0.7 * training.epochs[0].loss
    with pytest.raises(UsageError, match="feature_weight needs a teacher"):
        train(student, None, data, settings, seed=0, sums=sums)
