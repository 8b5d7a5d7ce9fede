"""Low rank: convolutions that become two, planned, cut, refitted, saved and loaded."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import secateur
from networks import make_network, random_images
from secateur.config import Budget, PlanSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.factorisation import (
    factorable_layers,
    factorise,
    form_of,
    matrix_of,
    product,
    replace_by_factors,
    tensors_with_products,
    write_products,
)
from secateur.graph.module_state import tensors_of
from secateur.pruning.allocation import SearchSpace, lowest_sensitivity
from secateur.pruning.cost.factored import FactoredCost
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.low_rank import LowRank
from secateur.pruning.plan import PruningPlan
from secateur.pruning.rank_sensitivity import measure_rank_sensitivity
from secateur.pruning.refit.rows import from_patch_order, in_patch_order
from secateur.runtime.errors import RunFolderError, UsageError

BOTH = {"plan.actions": ["channels", "rank"]}


def macs_of(model: nn.Module, images: Tensor) -> int:
    return secateur.build_dependency_graph(model, images).macs()


@pytest.mark.parametrize(
    ("shape", "form", "matrix"),
    [
        ((5, 4, 3, 3), "spatial", (12, 15)),
        ((5, 4, 5, 2), "spatial", (20, 10)),
        ((6, 7, 1, 1), "channel", (7, 6)),
        ((5, 4, 1, 3), "channel", (12, 5)),
    ],
)
def test_a_kernel_is_the_product_of_its_factors(
    shape: tuple[int, ...], form: str, matrix: tuple[int, int]
) -> None:
    kernel = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    assert form_of(shape) == form
    assert tuple(matrix_of(kernel).shape) == matrix
    whole = factorise(kernel, min(matrix))
    assert torch.allclose(product(*whole), kernel, atol=1e-6)
    first, second = factorise(kernel, 2)
    assert first.shape[:2] == (2, shape[1])
    assert second.shape[:2] == (shape[0], 2)
    low = product(first, second)
    values = torch.linalg.svdvals(matrix_of(kernel).double())
    assert float((low - kernel).square().sum()) == pytest.approx(
        float(values[2:].square().sum()), rel=1e-4
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": (2, 1), "stride": 2},
        {"kernel_size": (5, 3), "padding": (0, 2), "stride": (1, 2), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": (1, 3), "padding": (2, 1), "bias": False},
        {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
    ],
)
def test_two_convolutions_of_whole_rank_equal_the_one(arguments: dict[str, Any]) -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, **arguments)).double()
    images = random_images(2, 12).double().repeat(1, 2, 1, 1)
    split = copy.deepcopy(network)
    weight = network.get_parameter("0.weight")
    replace_by_factors(split, {"0": min(matrix_of(weight).shape)})
    assert [type(part) for part in split[0].children()] == [nn.Conv2d, nn.Conv2d]
    assert torch.allclose(split(images), network(images), atol=1e-10)
    products = tensors_with_products(split, {"0": 1})
    assert products.keys() == network.state_dict().keys()
    assert torch.allclose(products["0.weight"], weight)


def test_kernels_are_written_into_the_factors() -> None:
    network = nn.Sequential(nn.Conv2d(4, 5, 3))
    replace_by_factors(network, {"0": 3})
    kernel = product(*factorise(torch.randn(5, 4, 3, 3), 3))
    write_products(network, {"0": 3}, {"0.weight": kernel, "0.bias": torch.arange(5.0)})
    products = tensors_with_products(network, {"0": 3})
    assert torch.allclose(products["0.weight"], kernel, atol=1e-5)
    assert products["0.bias"].tolist() == [0, 1, 2, 3, 4]


def patches(inputs: int, taps: int) -> Tensor:
    """Correlated inputs, with the patch order's values: all inputs of a tap, then of the next."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs * taps, inputs * taps, generator=generator).double()
    return torch.randn(400, inputs * taps, generator=generator).double() @ mixing


def test_the_channel_form_is_the_best_there_is() -> None:
    rows = patches(6, 1)
    moments, kernel = rows.mT @ rows / len(rows), torch.randn(5, 6).double()
    scale = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]).double()
    low_rank = LowRank(kernel, moments, (5, 6, 1, 1), scale)
    scaled = scale[:, None] * kernel
    variances = torch.linalg.eigvalsh(scaled @ moments @ scaled.mT)  # rising
    for rank in range(1, 6):
        nearest = low_rank.nearest(rank)
        assert int(torch.linalg.matrix_rank(nearest)) == rank
        missing = (rows @ (nearest - kernel).mT * scale).square().sum(1).mean()
        assert float(missing) == pytest.approx(float(variances[: 5 - rank].sum()), abs=1e-8)
        assert low_rank.error(rank) == pytest.approx(float(missing), abs=1e-8)


def test_the_spatial_form_is_better_than_singular_values_alone() -> None:
    shape = (5, 4, 3, 3)
    rows = patches(4, 9)
    moments = rows.mT @ rows / len(rows)
    original = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()
    kernel = in_patch_order(original)[0]
    low_rank = LowRank(kernel, moments, shape, torch.ones(5))
    errors = []
    for rank in range(1, 13):
        nearest = from_patch_order(low_rank.nearest(rank)[None], original.shape)
        assert int(torch.linalg.matrix_rank(matrix_of(nearest), rtol=1e-8)) <= rank
        plain = in_patch_order(product(*factorise(original, rank)))[0]
        plain_error = (rows @ (plain - kernel).mT).square().sum(1).mean()
        errors.append(low_rank.error(rank))
        assert errors[-1] <= float(plain_error) + 1e-4
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0, abs=1e-3 * errors[0])
    curve = low_rank.curve(12)
    assert curve[0] == 0
    assert curve[5] == pytest.approx(errors[6], rel=1e-6)  # rank 7
    assert curve[12] == pytest.approx(float((rows @ kernel.mT).square().sum(1).mean()))


def test_the_error_on_other_patches_is_that_of_the_same_kernels() -> None:
    rows = patches(6, 1)
    fitted, measured = rows[:8], rows[8:]
    moments, others = (part.mT @ part / len(part) for part in (fitted, measured))
    kernel = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).double()
    low_rank = LowRank(kernel, moments, (5, 6, 1, 1), torch.ones(5))
    curve = low_rank.curve(5, others)
    for rank in range(1, 5):
        missing = measured @ (low_rank.nearest(rank) - kernel).mT
        error = float(missing.square().sum(1).mean())
        assert low_rank.error(rank, others) == pytest.approx(error)
        assert curve[5 - rank] >= error * (1 - 1e-9)
    assert curve == sorted(curve)


def test_few_images_do_not_hide_what_a_layer_before_a_pooling_needs() -> None:
    """The average of its maps has no more directions than there are images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(48, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(40, 30)).eval()
    images = torch.randn(12, 48, 1, 1).expand(-1, -1, 4, 4)
    dependencies = build_dependency_graph(network, images[:1])
    layers = factorable_layers(network, dependencies)
    numbers = torch.arange(len(images))
    batches = [Batch(images, torch.zeros_like(numbers), numbers)]
    curve = measure_rank_sensitivity(tensors_of(network), dependencies, layers, batches)["0"]
    whole = layers["0"].whole_rank
    assert whole == 22
    assert curve[0] == 0
    assert 0.1 * curve[whole] < curve[whole - 12] < curve[whole]


def test_which_convolutions_can_be_split() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(3, 16, 3, padding=1)
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
            self.read = nn.Conv2d(16, 16, 3, padding=1)
            self.twice = nn.Conv2d(16, 16, 3, padding=1)
            self.excluded = nn.Conv2d(16, 16, 3, padding=1)
            self.tiny = nn.Conv2d(16, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.reflected(self.grouped(self.plain(x)).relu()).relu()
            x = nn.functional.conv2d(x, self.read.weight, self.read.bias, padding=1).relu()
            x = self.excluded(self.twice(self.twice(x).relu())).relu()
            means: Tensor = self.tiny(x).mean((2, 3))
            return means

    network = Several()
    dependencies = build_dependency_graph(network, random_images(2, 8))
    layers = factorable_layers(network, dependencies, exclude=["excl*"])
    assert list(layers) == ["plain"]
    assert (layers["plain"].form, layers["plain"].whole_rank) == ("spatial", 8)


def test_costs_are_those_of_the_network() -> None:
    network, images = make_network("residual"), random_images(2, 8)
    dependencies = build_dependency_graph(network, images)
    layers = factorable_layers(network, dependencies)
    ranks = {name: max(1, layer.whole_rank // 2) for name, layer in layers.items()}
    removed = {"conv1.0": (0, 2)}
    plan = PruningPlan(removed, Budget("macs", 0.5), "mine", ranks=ranks)
    smaller = secateur.apply_plan(network, dependencies, plan)
    costs = FactoredCost(dependencies, layers, "macs").savings(ranks, removed)
    assert dependencies.macs(removed) - costs.sum() == macs_of(smaller, images)
    costs = FactoredCost(dependencies, layers, "params").savings(ranks, removed)
    counted = sum(parameter.numel() for parameter in smaller.parameters())
    assert dependencies.params(removed) - costs.sum() == counted
    assert check_equivalence(network, dependencies, plan, smaller, images) < 1e-5
    with pytest.raises(UsageError, match="plans by macs or params, not by latency"):
        FactoredCost(dependencies, layers, "latency")


def test_a_plan_with_ranks_is_kept_as_text() -> None:
    plan = PruningPlan({"a": (1,)}, Budget("macs", 0.5), "vote", ranks={"b": 3})
    text = plan.to_json()
    assert '"schema_version": 3' in text
    assert PruningPlan.from_json(text) == plan
    with pytest.raises(RunFolderError, match="does not match its content"):
        PruningPlan.from_json(text.replace('"b": 3', '"b": 4'))
    without = PruningPlan({"a": (1,)}, Budget("macs", 0.5), "vote")
    assert '"schema_version": 2' in without.to_json()
    assert plan.hash != without.hash


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"nothing": 2}, "splits 'nothing', which is not a convolution to split"),
        ({"linear": 2}, "splits 'linear', which is not a convolution to split"),
        ({"conv1": 0}, "gives 'conv1' the rank 0, not one from 1 to "),
        ({"conv1": 99}, "gives 'conv1' the rank 99, not one from 1 to "),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: dict[str, int], message: str) -> None:
    network = make_network("chain")
    dependencies = build_dependency_graph(network, random_images(2, 8))
    plan = PruningPlan({}, Budget("macs", 0.5), "mine", ranks=ranks)
    with pytest.raises(RunFolderError, match=message):
        secateur.apply_plan(network, dependencies, plan)


def test_a_first_step_that_saves_little_hides_no_better_one() -> None:
    def macs(counts: dict[str, int]) -> float:
        # 10 of rank 10 is what the layer takes whole, and rank 9 saves next to nothing.
        split = {10: 100.0, 9: 99.9, 5: 50.0, 1: 10.0}[counts["split"]]
        return split + 10 * counts["channels"]

    space = SearchSpace(
        {"split": [1, 5, 9, 10], "channels": list(range(1, 11))},
        macs,
        150,
        jumping=frozenset(["split"]),
    )
    curve = [0.0, 0.1, 0, 0, 0, 0.5, 0, 0, 0, 9.0, 99.0]
    channels = [0.0] + [n**1.0 for n in range(1, 11)]
    counts = lowest_sensitivity(space, {"split": curve, "channels": channels})
    assert counts == {"split": 5, "channels": 10}


@pytest.mark.parametrize("actions", [["rank"], ["channels", "rank"], "channels,rank"])
def test_pruning_by_rank_meets_the_budget_and_is_loaded_again(actions: Any, tmp_path: Path) -> None:
    network, images = make_network("residual"), random_images(80, 8)
    result = secateur.prune(network, images, target=0.6, settings={"plan.actions": actions})
    before, after = result.scores["before"].macs, result.scores["refit"].macs
    assert after <= 0.6 * before
    assert after == macs_of(result.model, images[:2])
    assert result.plan.ranks
    assert result.result.equivalence_error < 1e-4
    assert {split.name: split.rank for split in result.result.splits} == result.plan.ranks
    count = len(result.plan.ranks)
    assert f"{count} convolution{'s' * (count > 1)} split in two" in str(result)
    if actions == ["rank"]:
        assert not result.plan.removed
    with torch.no_grad():
        expected = result.model(images)
    result.save(tmp_path / "run")
    loaded = secateur.load(tmp_path / "run", architecture=network)
    program = secateur.load_program(tmp_path / "run")
    assert torch.equal(loaded(images), expected)
    assert torch.allclose(program(images), expected, atol=1e-6)
    report = tmp_path / "run" / "report.html"
    if isinstance(actions, str):  # with a gallery
        report = result.report(tmp_path / "report.html")
    page = report.read_text()
    assert "Convolutions split in two" in page


def test_the_refit_keeps_the_rank_and_helps() -> None:
    network, images = make_network("residual"), random_images(300, 8)
    settings = {"plan.actions": ["rank"]}
    plain = secateur.prune(
        network,
        images,
        target=0.6,
        settings={**settings, "refit.layers": "none", "refit.recalibrate_batchnorm": False},
    )
    refitted = secateur.prune(network, images, target=0.6, settings=settings)
    assert plain.plan == refitted.plan
    for name, rank in refitted.plan.ranks.items():
        first = refitted.model.get_parameter(f"{name}.0.weight")
        assert first.shape[0] == rank

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(images) - network.eval()(images)).square().mean())

    assert distance(refitted.model) < 0.8 * distance(plain.model)


def test_a_network_in_bfloat16_comes_back_as_such() -> None:
    network = make_network("chain").bfloat16()
    result = secateur.prune(network, random_images(40, 8), target=0.7, settings=BOTH)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actions": []}, "name channels, rank, depth or several"),
        ({"actions": ["rank", "rank"]}, "each once"),
        ({"actions": ["width"]}, "'channels', 'rank' or 'depth'"),
        ({"actions": ["rank"], "target": "latency=0.5"}, "rank does not plan by latency"),
        ({"actions": ["rank"], "allocation": "uniform"}, "needs allocation = 'sensitivity'"),
        ({"actions": ["rank"], "rounds": 2}, "needs rounds = 1"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PlanSection(**settings)


def test_the_curve_of_one_rank() -> None:
    low_rank = LowRank(torch.ones(2, 2), torch.eye(2), (2, 2, 1, 1), torch.ones(2))
    assert low_rank.curve(2) == pytest.approx([0, 0, 4], abs=1e-12)
    assert math.isfinite(
        LowRank(torch.zeros(2, 2), torch.eye(2), (2, 2, 1, 1), torch.ones(2)).error(1)
    )
