"""Batch-norm statistics: their new values, when they change, and what they leave unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from networks import Chain, random_images, randomise_norms
from secateur.data import Batch
from secateur.models.divergence import DivergenceFrom, divergence_from, outputs_of
from secateur.pruning.refit.batchnorm import FRACTIONS, _norms, _reestimated, recalibrate_batchnorm
from secateur.pruning.refit.significance import is_smaller


def in_batches(images: Tensor, size: int) -> list[Batch]:
    parts = torch.arange(len(images)).split(size)
    return [Batch(images[part], torch.zeros(len(part)).long(), part) for part in parts]


def again(batches: list[Batch]) -> Callable[[], list[Batch]]:
    return lambda: batches


@pytest.fixture
def fit() -> list[Batch]:
    return in_batches(random_images(23), 8)


@pytest.fixture
def held_out() -> list[Batch]:
    return in_batches(random_images(30), 8)[3:]


def estimated(model: Chain, batches: list[Batch]) -> Chain:
    """A copy with the statistics that its own batches have."""
    copied = copy.deepcopy(model)
    norms = _norms(copied)
    for norm, (mean, variance) in zip(norms, _reestimated(copied, norms, batches), strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return copied


def perturbed(model: Chain, generator: torch.Generator) -> Chain:
    """A copy whose statistics are far from what its norms read."""
    copied = copy.deepcopy(model)
    for norm in (copied.bn1, copied.bn2):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += torch.randn(norm.num_features, generator=generator)
        norm.running_var *= 4
    return copied


def distance(model: nn.Module, smaller: nn.Module, batches: list[Batch]) -> float:
    return divergence_from(outputs_of(model, batches), smaller, batches).divergence


def divergence_of(model: nn.Module, batches: list[Batch]) -> DivergenceFrom:
    return DivergenceFrom(outputs_of(model, batches), again(batches))


def test_statistics_are_the_mean_of_those_of_batches_weighed_by_their_images(
    fit: list[Batch],
) -> None:
    model = Chain().eval()
    (mean, variance), _ = _reestimated(model, _norms(model), fit)
    maps = [model.conv1(batch.images).double() for batch in fit]
    weights = [len(batch.images) / 23 for batch in fit]
    means = sum(w * m.mean((0, 2, 3)) for w, m in zip(weights, maps, strict=True))
    variances = sum(w * m.var((0, 2, 3)) for w, m in zip(weights, maps, strict=True))
    assert isinstance(means, Tensor)
    assert isinstance(variances, Tensor)
    assert torch.allclose(mean.double(), means, atol=1e-6)
    assert torch.allclose(variance.double(), variances, atol=1e-6)


def test_perturbed_statistics_are_recovered(
    fit: list[Batch], held_out: list[Batch], generator: torch.Generator
) -> None:
    model = estimated(Chain().eval(), fit)
    smaller = perturbed(model, generator)
    before = distance(model, smaller, held_out)
    change = recalibrate_batchnorm(smaller, again(fit), divergence_of(model, held_out))
    assert change is not None
    assert (change.statistics, change.fraction) == ("both", 1.0)
    assert change.divergence_before == pytest.approx(before)
    assert change.divergence_after == pytest.approx(distance(model, smaller, held_out))
    assert change.divergence_after < 1e-6 < before


@pytest.mark.parametrize("seed", range(4))
def test_the_held_out_divergence_never_grows(
    seed: int, fit: list[Batch], held_out: list[Batch]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = Chain().eval()
    randomise_norms(model, generator)
    smaller = perturbed(model, generator)
    before = distance(model, smaller, held_out)
    change = recalibrate_batchnorm(smaller, again(fit), divergence_of(model, held_out))
    assert change is not None
    assert change.fraction in (0.0, *FRACTIONS)
    assert distance(model, smaller, held_out) == pytest.approx(change.divergence_after)
    assert change.divergence_after <= change.divergence_before == pytest.approx(before)


def test_fractions_are_tried_as_long_as_the_divergence_falls(fit: list[Batch]) -> None:
    smaller = Chain().eval()
    by_statistics = {"means": (0.9, 0.8, 0.85), "both": (0.95, 0.7, 0.6, 0.5)}
    divergences = [mean for means in by_statistics.values() for mean in means]
    tried = iter(divergences)
    before_it = copy.deepcopy(smaller.bn1.running_var)

    def divergence_of(network: nn.Module) -> Tensor:
        assert network is smaller
        return torch.full((10,), next(tried)).double()

    before = torch.ones(10).double() + 0.01 * torch.arange(10) - 0.045
    change = recalibrate_batchnorm(smaller, again(fit), divergence_of, before)
    assert change is not None
    assert next(tried, None) is None
    assert (change.statistics, change.fraction) == ("both", 1.0)
    assert change.divergence_before == pytest.approx(1.0)
    assert change.divergence_after == pytest.approx(0.5)
    assert smaller.bn1.running_var is not None
    assert before_it is not None
    assert not torch.equal(smaller.bn1.running_var, before_it)


def test_correct_statistics_stay(
    fit: list[Batch], held_out: list[Batch], generator: torch.Generator
) -> None:
    model = Chain().eval()
    randomise_norms(model, generator)
    smaller = copy.deepcopy(model)
    change = recalibrate_batchnorm(smaller, again(fit), divergence_of(model, held_out))
    assert change is not None
    assert change.fraction == 0
    assert all(torch.equal(model.state_dict()[n], t) for n, t in smaller.state_dict().items())


def test_a_gain_due_to_one_image_does_not_count(generator: torch.Generator) -> None:
    before = torch.ones(100).double() + 0.01 * torch.randn(100, generator=generator)
    one_better = before.clone()
    one_better[7] -= 0.9
    assert not is_smaller(before, one_better)
    all_better = before - 0.009 + 0.01 * torch.randn(100, generator=generator)
    assert is_smaller(before, all_better)
    assert not is_smaller(all_better, before)
    assert not is_smaller(before[:1], before[:1] - 1)


def test_nothing_but_means_and_variances_changes(
    fit: list[Batch], held_out: list[Batch], generator: torch.Generator
) -> None:
    model = estimated(Chain().eval(), fit)
    smaller = perturbed(model, generator)
    smaller.bn1.momentum, smaller.bn2.momentum = 0.3, None
    smaller.train()
    smaller.bn2.eval()
    before = copy.deepcopy(smaller.state_dict())
    recalibrate_batchnorm(smaller, again(fit), divergence_of(model, held_out))
    assert (smaller.bn1.momentum, smaller.bn2.momentum) == (0.3, None)
    assert (smaller.training, smaller.bn1.training, smaller.bn2.training) == (True, True, False)
    changed = {n for n, t in smaller.state_dict().items() if not torch.equal(before[n], t)}
    assert changed == {f"bn{n}.running_{kind}" for n in (1, 2) for kind in ("mean", "var")}


def test_a_failure_leaves_the_statistics_as_they_were(generator: torch.Generator) -> None:
    model = Chain()
    randomise_norms(model, generator)
    before = copy.deepcopy(model.state_dict())
    wrong = [*in_batches(random_images(4), 4), *in_batches(torch.rand(4, 2, 8, 8), 4)]
    with pytest.raises(RuntimeError, match="channels"):
        _reestimated(model, _norms(model), wrong)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training


def test_a_batch_of_one_image_is_left_out() -> None:
    model = Chain().eval()
    images = random_images(9)
    one = _reestimated(model, _norms(model), in_batches(images, 4))
    other = _reestimated(model, _norms(model), in_batches(images[:8], 4))
    for value, expected in zip(one, other, strict=True):
        assert all(map(torch.equal, value, expected))


def test_a_network_without_running_statistics_is_left_alone(fit: list[Batch]) -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), nn.Sequential(norm)):
        unused = DivergenceFrom((), again(fit))
        assert recalibrate_batchnorm(copy.deepcopy(model), again(fit), unused) is None
