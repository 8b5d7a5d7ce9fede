"""Blocks with parallel branches: folded before the cut, in run folders, and named in a hint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur
from networks import random_images, random_plan, randomise_norms
from secateur.experiments import run_folder
from secateur.experiments.original import untrained_original
from secateur.experiments.run_folder import Origin
from secateur.graph.build import build_dependency_graph
from secateur.models.reparameterize import branched_blocks, reparameterized
from secateur.models.zoo import load as load_model
from secateur.pruning.apply import apply_plan
from secateur.runtime.errors import TargetError, UsageError

FOLDED = {"model.reparameterize": True, "score.fast": True}


class Block(nn.Module):
    """A 3×3 and a 1×1 convolution with batch norms, and the identity, added up."""

    def __init__(self, channels: int, *, is_wrong: bool = False) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.wide_norm = nn.BatchNorm2d(channels)
        self.narrow = nn.Conv2d(channels, channels, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(channels)
        self.reparam_conv: nn.Conv2d | None = None
        self.is_wrong = is_wrong

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            folded: Tensor = self.reparam_conv(x)
            return folded.relu()
        wide: Tensor = self.wide_norm(self.wide(x))
        narrow: Tensor = self.narrow_norm(self.narrow(x))
        return (wide + narrow + x).relu()

    def reparameterize(self) -> None:
        channels = len(self.wide.weight)
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        kernel, bias = _folded(self.wide.weight, self.wide_norm)
        narrow, narrow_bias = _folded(self.narrow.weight, self.narrow_norm)
        kernel[:, :, 1:2, 1:2] += narrow + torch.eye(len(kernel))[:, :, None, None]
        convolution.weight.data = kernel * (2 if self.is_wrong else 1)
        convolution.bias = nn.Parameter(bias + narrow_bias)
        self.reparam_conv = convolution
        for name in ("wide", "wide_norm", "narrow", "narrow_norm"):
            delattr(self, name)


def _folded(kernel: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    bias = norm.bias.detach() - norm.running_mean * scale
    return kernel.detach() * scale[:, None, None, None], bias


def branched(*, is_wrong: bool = False) -> nn.Sequential:
    """A network of two such blocks, between a first convolution and a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        Block(8, is_wrong=is_wrong),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    randomise_norms(model, torch.Generator().manual_seed(0))
    return model.eval()


def test_a_folded_network_returns_the_same() -> None:
    model, images = branched(), random_images(4, 16)
    folded = reparameterized(model, images)
    assert branched_blocks(model) == 2
    assert branched_blocks(folded) == 0
    assert reparameterized(folded) is folded
    assert torch.allclose(folded(images), model(images), atol=1e-5)


def test_a_network_that_folding_changes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"folded, its outputs differ by .* \(relative error;"):
        reparameterized(branched(is_wrong=True), random_images(4, 16))


def test_the_target_is_in_reach_of_the_folded_network_alone(tmp_path: Path) -> None:
    model, images = branched(), random_images(40, 16)
    with pytest.raises(TargetError, match="2 blocks of the network have parallel branches"):
        secateur.prune(model, [images], target=0.3, settings={"score.fast": True})
    result = secateur.prune(model, [images], target=0.3, settings=FOLDED)
    result.save(tmp_path / "run")

    loaded = secateur.load(tmp_path / "run", architecture=branched())
    assert result.scores["refit"].macs <= 0.3 * result.scores["before"].macs
    assert branched_blocks(model) == 2
    assert torch.equal(loaded(images), result.model(images))


def test_a_named_network_is_folded_when_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    images = random_images(2, 32)
    folded = reparameterized(load_model("timm:repvgg_a0", num_classes=3), images)
    dependencies = build_dependency_graph(folded, images)
    plan = random_plan(dependencies, torch.Generator().manual_seed(0))
    smaller = apply_plan(folded, dependencies, plan)
    origin = Origin("timm:repvgg_a0", (3, 32, 32), num_classes=3, reparameterized=True)
    run_folder.write(tmp_path, smaller, plan, origin)
    assert torch.equal(run_folder.load(tmp_path)(images), smaller(images))
    original, _ = untrained_original(tmp_path, None, None)
    assert original is not None
    assert branched_blocks(original) == 0  # it is timed as it runs

    saved = tmp_path / "saved"
    name = "timm:repvgg_a0"
    secateur.save(
        saved, smaller, plan, image_shape=(3, 32, 32), architecture=name, reparameterized=True
    )
    assert torch.equal(run_folder.load(saved)(images), smaller(images))


def test_a_network_without_blocks_to_fold_is_told() -> None:
    images = random_images(20, 16)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )
    result = secateur.prune(model, [images], target=0.8, settings=FOLDED)
    assert any("has no blocks to fold" in notice for notice in result.result.notices)
