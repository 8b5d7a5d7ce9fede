from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn

from networks import (
    CLASSES,
    NETWORKS,
    Chain,
    make_network,
    random_images,
    random_plan,
    randomise_norms,
)
from processes import side_by_side
from secateur.config import Budget, RefitForm, RefitSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.module_state import tensors_of
from secateur.graph.patches import window_of
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.outcome import LayerRefit
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit import layerwise, patch_regression
from secateur.pruning.refit.layers import refit_layer
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.pruning.refit.regression_targets import RegressionTargets
from secateur.pruning.refit.rows import in_patch_order
from secateur.pruning.refit.target_layers import target_layer
from secateur.runtime.errors import DataError
from secateur.scoring import batching

ALL_POSITIONS = RefitSection(positions=10_000)
ALL_ERRORS = RefitSection(positions=10_000, rectified=False, joint=False)
"""Errors that a rectifier hides count as well."""


def in_batches(images: Tensor, size: int = 16) -> list[Batch]:
    numbers = torch.arange(len(images)).split(size)
    parts = zip(images.split(size), numbers, strict=True)
    return [Batch(images, torch.zeros(len(images)).long(), indices) for images, indices in parts]


CALIBRATION = in_batches(random_images(96, seed=3))
"""Six batches; every fifth image is held out of the fit."""


def plan_of(**removed: tuple[int, ...]) -> PruningPlan:
    """A plan; the double underscore stands for a dot."""
    names = {name.replace("__", "."): filters for name, filters in removed.items()}
    return PruningPlan(names, Budget("macs", 0.5), "test")


def half_of(dependencies: DependencyGraph, seed: int = 0) -> PruningPlan:
    """A plan that removes a random half of every group."""
    generator = torch.Generator().manual_seed(seed)
    removed = {
        name: tuple(sorted(torch.randperm(len(group), generator=generator)[: len(group) // 2]))
        for name, group in dependencies.groups.items()
    }
    return PruningPlan(
        {name: tuple(int(f) for f in filters) for name, filters in removed.items()},
        Budget("filters", 0.5),
        "random",
    )


_graphs: dict[str, DependencyGraph] = {}


def graph_of(model: nn.Module) -> DependencyGraph:
    """The dependency graph, traced once for all networks that are built alike."""
    built = repr(model)
    if built not in _graphs:
        _graphs[built] = build_dependency_graph(model, random_images(2))
    return _graphs[built]


def cut_and_refit(
    model: nn.Module,
    plan: PruningPlan,
    batches: list[Batch] = CALIBRATION,
    settings: RefitSection = ALL_POSITIONS,
    *,
    seed: int = 0,
) -> tuple[nn.Module, tuple[LayerRefit, ...]]:
    dependencies = graph_of(model)
    smaller = apply_plan(model, dependencies, plan)
    inputs = RefitInputs(model, smaller, dependencies, plan.removed)
    results = refit(inputs, batches, settings, seed=seed)
    return smaller, results


def cut_only(model: nn.Module, plan: PruningPlan) -> nn.Module:
    return apply_plan(model, graph_of(model), plan)


def error_on_new_images(model: nn.Module, smaller: nn.Module) -> float:
    images = random_images(32, seed=99)
    with torch.no_grad():
        return relative_error(smaller(images), model(images))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def assert_finite(smaller: nn.Module, results: tuple[LayerRefit, ...]) -> None:
    for name, tensor in smaller.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    for result in results:
        assert math.isfinite(result.error_cut), result.layer
        assert math.isfinite(result.error_refit), result.layer


# --- what holds for every network -----------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_with_nothing_removed_nothing_changes(name: str) -> None:
    model = make_network(name)
    smaller, results = cut_and_refit(model, plan_of(), CALIBRATION[:2])
    assert results == ()
    assert_same_state(smaller, state_of(model))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_no_layer_gets_worse_and_the_original_is_left_alone(name: str) -> None:
    model = make_network(name).train()
    for parameter in list(model.parameters())[:1]:
        parameter.requires_grad_(False)
    before = state_of(model)
    plan = half_of(graph_of(model))
    cut = cut_only(model, plan)
    smaller, results = cut_and_refit(model, plan)

    assert_finite(smaller, results)
    for result in results:
        assert result.error_refit <= result.error_cut
        assert (result.ridge is None) >= bool(result.note)  # a note only where nothing was done
        if result.ridge is not None:
            assert result.error_refit < result.error_cut
    assert_same_state(model, before)
    for module, other in zip(smaller.modules(), cut.modules(), strict=True):
        assert module.training == other.training
    for parameter, as_cut in zip(smaller.parameters(), cut.parameters(), strict=True):
        assert parameter.shape == as_cut.shape
        assert parameter.requires_grad == as_cut.requires_grad
        assert parameter.grad is None


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "depthwise", "in_place"])
def test_refit_brings_the_outputs_closer_on_new_images(name: str) -> None:
    model = make_network(name)
    plan = half_of(graph_of(model))
    smaller, _ = cut_and_refit(model, plan)
    images = random_images(64, seed=99)
    with torch.no_grad():
        wanted, cut, refitted = (m.eval()(images) for m in (model, cut_only(model, plan), smaller))
    assert (refitted - wanted).square().mean() < 0.7 * (cut - wanted).square().mean()


def test_the_same_seed_draws_the_same_positions() -> None:
    model = make_network("chain")
    plan, few = plan_of(conv1=(0, 3)), RefitSection(positions=2)
    first, results = cut_and_refit(model, plan, settings=few, seed=5)
    again, results_again = cut_and_refit(model, plan, settings=few, seed=5)
    other, _ = cut_and_refit(model, plan, settings=few, seed=6)
    assert results == results_again
    assert_same_state(again, state_of(first))
    assert not torch.equal(other.get_parameter("conv2.weight"), first.get_parameter("conv2.weight"))


def test_only_consumers_are_refitted_on_request() -> None:
    model = make_network("residual")
    plan = plan_of(conv1__0=(0,))
    _, readers = cut_and_refit(model, plan, settings=RefitSection(layers="consumers"))
    _, downstream = cut_and_refit(model, plan, settings=RefitSection(layers="downstream"))
    assert [result.layer for result in readers] == ["conv2.0"]
    assert [result.layer for result in downstream] == ["conv2.0", "conv3.0", "conv4.0", "linear"]


# --- redundant filters ----------------------------------------------------------------------------


def duplicate(conv: nn.Module, norm: nn.Module, source: int, copy: int) -> None:
    with torch.no_grad():
        for module in (conv, norm):
            for tensor in tensors_of(module).values():
                if tensor.dim():
                    tensor[copy] = tensor[source]


def test_cutting_a_copy_of_a_kept_filter_is_repaired_in_a_chain() -> None:
    model = make_network("chain")
    duplicate(model.get_submodule("conv1"), model.get_submodule("bn1"), 1, 4)
    duplicate(model.get_submodule("conv2"), model.get_submodule("bn2"), 5, 0)
    plan = plan_of(conv1=(4,), conv2=(0,))
    smaller, results = cut_and_refit(model, plan)
    assert error_on_new_images(model, cut_only(model, plan)) > 1e-2
    assert error_on_new_images(model, smaller) < 1e-4
    assert [result.layer for result in results] == ["conv2", "linear"]
    assert all(result.error_refit < 1e-6 < 1e-3 < result.error_cut for result in results)


def test_cutting_a_copy_of_a_kept_filter_is_repaired_in_residual_blocks() -> None:
    model = make_network("residual")
    duplicate(model.get_submodule("conv1.0"), model.get_submodule("conv1.1"), 1, 3)
    duplicate(model.get_submodule("conv3.0"), model.get_submodule("conv3.1"), 0, 2)
    plan = plan_of(conv1__0=(3,), conv3__0=(2,))
    smaller, _ = cut_and_refit(model, plan)
    assert error_on_new_images(model, cut_only(model, plan)) > 1e-2
    assert error_on_new_images(model, smaller) < 1e-4


@pytest.mark.parametrize("name", ["concat", "gated", "view_rest", "depthwise"])
def test_cutting_a_copy_of_a_kept_filter_is_repaired_elsewhere(name: str) -> None:
    layer = {"concat": "left", "gated": "conv", "view_rest": "conv", "depthwise": "expand"}[name]
    model = make_network(name)
    duplicate(model.get_submodule(f"{layer}.0"), model.get_submodule(f"{layer}.1"), 0, 2)
    if name == "depthwise":
        duplicate(model.get_submodule("depthwise.0"), model.get_submodule("depthwise.1"), 0, 2)
    if name == "gated":  # the gates of the two must agree as well
        with torch.no_grad():
            for tensor in tensors_of(model.get_submodule("excite")).values():
                tensor[2] = tensor[0]
    plan = PruningPlan({f"{layer}.0": (2,)}, Budget("macs", 0.9), "test")
    # Where all of the map is flattened an image is one row, for 80 unknowns an output.
    batches = in_batches(random_images(400, seed=3), size=50)
    smaller, _ = cut_and_refit(model, plan, batches)
    assert error_on_new_images(model, cut_only(model, plan)) > 1e-2
    assert error_on_new_images(model, smaller) < 1e-4


class Linear(nn.Module):
    """Two convolutions without a rectifier between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.relu(self.conv2(self.conv1(images))).mean((2, 3)))
        return logits


def test_cutting_a_combination_of_kept_filters_is_repaired() -> None:
    model = Linear().eval()
    with torch.no_grad():
        model.conv1.weight[5] = 0.5 * model.conv1.weight[0] - 2.0 * model.conv1.weight[3]
        expected = model.conv2.weight[:, :5].clone()
        expected[:, 0] += 0.5 * model.conv2.weight[:, 5]
        expected[:, 3] -= 2.0 * model.conv2.weight[:, 5]
    smaller, _ = cut_and_refit(model, plan_of(conv1=(5,)))
    assert error_on_new_images(model, smaller) < 1e-4
    torch.testing.assert_close(
        smaller.get_parameter("conv2.weight"), expected, atol=1e-3, rtol=1e-3
    )


# --- where an offset goes -------------------------------------------------------------------------


class Offset(nn.Module):
    """A 1x1 convolution that reads a constant channel; `kind` says what follows it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 1, bias=kind == "bias")
        self.norm2 = nn.BatchNorm2d(5) if kind == "norm" else nn.Identity()
        self.linear = nn.Linear(5, CLASSES)
        randomise_norms(self, torch.Generator().manual_seed(2))
        with torch.no_grad():
            self.norm1.weight[4] = 0.0
            self.norm1.bias[4] = 1.0

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        logits: Tensor = self.linear(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))
        return logits


@pytest.mark.parametrize(("kind", "sign"), [("bias", 1), ("norm", -1)])
def test_a_constant_channel_moves_into_the_bias_or_the_running_mean(kind: str, sign: int) -> None:
    model = Offset(kind).eval()
    smaller, _ = cut_and_refit(model, plan_of(conv1=(4,)))
    name = {"bias": "conv2.bias", "norm": "norm2.running_mean"}[kind]
    lost = model.conv2.weight.detach()[:, 4, 0, 0]
    expected = tensors_of(model)[name] + sign * lost
    torch.testing.assert_close(tensors_of(smaller)[name], expected, atol=1e-4, rtol=1e-4)
    kept = model.conv2.weight.detach()[:, [0, 1, 2, 3, 5]]
    weight = tensors_of(smaller)["conv2.weight"]
    torch.testing.assert_close(weight, kept, atol=1e-4, rtol=1e-4)
    assert error_on_new_images(model, smaller) < 1e-4


def test_a_layer_without_a_place_for_an_offset_still_gets_a_better_kernel() -> None:
    model = Offset("none").eval()
    smaller, results = cut_and_refit(model, plan_of(conv1=(4,)))
    assert_finite(smaller, results)
    assert results[0].layer == "conv2"
    assert results[0].error_refit < results[0].error_cut


# --- the least-squares problem --------------------------------------------------------------------


def chain() -> Chain:
    model = make_network("chain")
    assert isinstance(model, Chain)
    return model


def rows_of(model: nn.Module, kept: list[int], batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Patches `[row, input]` of the kept maps and what `conv2` of a chain answers, in float64."""
    assert isinstance(model, Chain)
    images = torch.cat([batch.images for batch in batches])
    with torch.no_grad():
        maps = F.relu(model.bn1(model.conv1(images)))
        wanted = model.conv2(maps)  # [image, 7, 4, 4]
    patches = F.unfold(maps[:, kept], 3, padding=1, stride=2)  # [image, input, position]
    rows = patches.movedim(1, 2).flatten(0, 1).double()
    return rows, wanted.flatten(2).movedim(1, 2).flatten(0, 1).double()


def test_without_a_ridge_it_is_ordinary_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_regression, "RIDGES", (1e-12,))
    model, kept = chain(), [0, 2, 3, 5]
    smaller, results = cut_and_refit(model, plan_of(conv1=(1, 4)), settings=ALL_ERRORS)
    assert results[0].ridge == 1e-12
    x, y = rows_of(model, kept, of_images(lambda n: n % 5 != 4))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    weight = tensors_of(smaller)["conv2.weight"].double().flatten(1)
    torch.testing.assert_close(weight, solution[:-1].T, atol=1e-5, rtol=1e-4)
    bias = tensors_of(smaller)["conv2.bias"].double()
    torch.testing.assert_close(bias, solution[-1], atol=1e-5, rtol=1e-4)


def of_images(wanted: Callable[[Tensor], Tensor]) -> list[Batch]:
    """One batch of those calibration images whose number is wanted."""
    images = torch.cat([batch.images for batch in CALIBRATION])
    chosen = wanted(torch.arange(len(images)))
    return in_batches(images[chosen], size=len(images))


def test_errors_are_measured_on_every_fifth_image() -> None:
    model, kept = chain(), [0, 2, 3, 5]
    _, results = cut_and_refit(model, plan_of(conv1=(1, 4)), settings=ALL_ERRORS)
    fit_x, fit_y = rows_of(model, kept, of_images(lambda n: n % 5 != 4))
    x, y = rows_of(model, kept, of_images(lambda n: n % 5 == 4))
    old = model.conv2.weight.detach()[:, kept].double().flatten(1)
    bias = model.conv2.bias
    assert bias is not None
    variance = y.var(0, correction=0).sum()

    error_cut = (y - x @ old.T - bias.detach()).square().mean(0).sum() / variance
    assert results[0].error_cut == pytest.approx(float(error_cut), rel=1e-6)

    # |y - Wx - b|^2 / n + ridge s |W - old|^2 with s the inputs' mean variance, as rows to solve.
    assert results[0].ridge is not None
    centred = fit_x - fit_x.mean(0)
    strength = results[0].ridge * centred.square().mean()
    inputs = centred.shape[1]
    penalty = (strength * len(fit_x)).sqrt() * torch.eye(inputs, dtype=torch.float64)
    left = torch.cat([centred, penalty])
    right = torch.cat([fit_y - fit_y.mean(0), penalty @ old.T])
    new = torch.linalg.lstsq(left, right).solution
    residual = (y - fit_y.mean(0)) - (x - fit_x.mean(0)) @ new
    error_refit = residual.square().mean(0).sum() / variance
    assert results[0].error_refit == pytest.approx(float(error_refit), rel=1e-6)


class OneConvolution(nn.Module):
    """A convolution of any geometry between a stem and the head."""

    def __init__(self, make: Callable[[], nn.Conv2d]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = make()
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.stem(images))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


GEOMETRIES: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(4, 5, 3, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 5, 1, bias=False),
    "padded": lambda: nn.Conv2d(4, 5, 3, padding=1, bias=False),
    "strided": lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
    "dilated": lambda: nn.Conv2d(4, 5, 3, dilation=2, padding=2, bias=False),
    "oblong": lambda: nn.Conv2d(4, 5, (1, 5), padding=(0, 2), bias=False),
    "all different": lambda: nn.Conv2d(
        4, 5, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False
    ),
    "same": lambda: nn.Conv2d(4, 5, 3, padding="same", bias=False),
    "same, even kernel": lambda: nn.Conv2d(4, 5, (2, 4), padding="same", bias=False),
    "valid": lambda: nn.Conv2d(4, 5, 3, padding="valid", bias=False),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patches_times_the_kernel_are_the_convolution(geometry: str) -> None:
    model = OneConvolution(GEOMETRIES[geometry]).eval()
    dependencies = graph_of(model)
    (layer,) = [layer for layer in dependencies.layers if layer.name == "conv"]
    window = window_of(layer.node, model.conv.kernel_size)
    inputs = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        expected = model.conv(inputs)
        assert window.positions(8, 8) == expected.shape[2:]
        positions = torch.arange(expected[0, 0].numel()).expand(3, -1)
        outputs = (
            window.patches(inputs, positions, torch.arange(len(inputs)))
            @ in_patch_order(model.conv.weight)[0].T
        )
    torch.testing.assert_close(outputs.movedim(-1, 1), expected.flatten(2))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_copy_is_repaired_whatever_the_geometry(geometry: str) -> None:
    model = OneConvolution(GEOMETRIES[geometry]).eval()
    duplicate(model.stem, nn.Identity(), 0, 2)
    smaller, _ = cut_and_refit(model, plan_of(stem=(2,)))
    assert error_on_new_images(model, smaller) < 1e-4


def test_many_values_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = cut_and_refit(make_network("chain"), plan_of(conv1=(0,)))
    monkeypatch.setattr(patch_regression, "MAX_ROW_VALUES", 1)
    parts, _ = cut_and_refit(make_network("chain"), plan_of(conv1=(0,)))
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5)


# --- thin and degenerate data ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "residual", "view_rest", "gated"])
def test_fewer_rows_than_unknowns_stay_finite(name: str) -> None:
    model = make_network(name)
    plan = half_of(graph_of(model))
    batches = in_batches(random_images(2, seed=3))
    smaller, results = cut_and_refit(model, plan, batches, RefitSection(positions=1))
    assert results
    assert_finite(smaller, results)
    with torch.no_grad():
        assert torch.isfinite(smaller(random_images(4))).all()


def test_kernels_of_dead_channels_stay_as_they_are() -> None:
    model = chain()
    with torch.no_grad():
        model.bn1.weight[[0, 3]] = 0.0
        model.bn1.bias[[0, 3]] = -1.0  # zero behind the rectifier
    smaller, results = cut_and_refit(model, plan_of(conv1=(1,)))
    assert_finite(smaller, results)
    assert results[0].ridge is not None
    weight, old = tensors_of(smaller)["conv2.weight"], model.conv2.weight.detach()
    torch.testing.assert_close(weight[:, [0, 2]], old[:, [0, 3]])  # 3 moved down one place


def test_a_network_whose_kept_channels_are_all_dead_stays_finite() -> None:
    model = chain()
    with torch.no_grad():
        model.bn1.weight[1:] = 0.0
        model.bn1.bias[1:] = -1.0
    smaller, results = cut_and_refit(model, plan_of(conv1=(0,)))
    assert_finite(smaller, results)
    assert results[0].error_refit < results[0].error_cut  # the mean is all that can be met


def test_constant_outputs_stay_finite() -> None:
    model = chain()
    with torch.no_grad():
        model.conv2.weight.zero_()
    smaller, results = cut_and_refit(model, plan_of(conv1=(0,)))
    assert_finite(smaller, results)
    assert error_on_new_images(model, smaller) < 1e-4


def test_uneven_batches_are_taken_as_they_come() -> None:
    model = chain()
    duplicate(model.conv1, model.bn1, 1, 4)
    batches = in_batches(random_images(75, seed=3), size=17)
    smaller, _ = cut_and_refit(model, plan_of(conv1=(4,)), batches)
    assert error_on_new_images(model, smaller) < 1e-4


# --- every consumer, in both forms ----------------------------------------------------------------

FORMS: tuple[RefitForm, ...] = ("patch", "channel")


class Consumer(nn.Module):
    """A layer of any kind behind a linear stem of eight channels, read through the head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = make()
        self.linear = nn.LazyLinear(CLASSES)
        self(random_images(2))
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(F.relu(self.body(self.stem(images))).flatten(1))
        return logits


class Joined(nn.Module):
    """Two readings of the channels behind each other, read by one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(16, 4, 3)

    def forward(self, maps: Tensor) -> Tensor:
        joined: Tensor = self.last(torch.cat([maps, 2.0 * self.norm(maps)], 1))
        return joined


class Along(nn.Module):
    """Maps flattened to one dimension of positions, or spread over three, and convolved."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv1d):
            maps = maps.flatten(2)
        elif isinstance(self.layer, nn.Conv3d):
            maps = maps.unflatten(3, (2, 4))
        else:
            maps = maps.flatten(2).transpose(1, 2)
        output: Tensor = self.layer(maps)
        return output


class FlattenedTokens(nn.Module):
    """A linear layer that reads all of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8 * 4, 6)

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.layer(F.adaptive_avg_pool2d(maps, 2).flatten(1))
        return output


CONSUMERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(8, 5, 3, padding=1, stride=2),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise-separable": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 5, 1)
    ),
    "transposed": lambda: nn.ConvTranspose2d(8, 5, 2, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
    "conv1d": lambda: Along(nn.Conv1d(8, 5, 3, padding=1, stride=2)),
    "conv3d": lambda: Along(nn.Conv3d(8, 5, 3, padding=1)),
    "linear on positions": lambda: Along(nn.Linear(8, 5)),
    "linear after flatten": FlattenedTokens,
    "concat": Joined,
}


def with_combination(name: str) -> tuple[nn.Module, PruningPlan]:
    """A network some of whose channels are combinations of others, and a plan that removes them.

    Of two groups of four channels each loses its last one.
    """
    torch.manual_seed(11)
    model = Consumer(CONSUMERS[name]).eval()
    randomise_norms(model, torch.Generator().manual_seed(2))
    with torch.no_grad():
        for lost, one, other in ((3, 0, 1), (7, 4, 6)):
            if name == "depthwise-separable":  # a channel of its own can only be a copy
                depthwise = model.get_submodule("body.0")
                depthwise.get_parameter("weight")[lost] = depthwise.get_parameter("weight")[one]
                combine = [(one, 1.0)]
            else:
                combine = [(one, 0.5), (other, -2.0)]
            for tensor in tensors_of(model.get_submodule("stem")).values():
                tensor[lost] = sum(weight * tensor[channel] for channel, weight in combine)
    dependencies = graph_of(model)
    (group,) = [name for name in dependencies.groups if name.startswith("stem")]
    size = len(dependencies.groups[group])
    return model, PruningPlan({group: (3, 7) if size == 8 else (3,)}, Budget("macs", 0.5), "test")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONSUMERS)
def test_combinations_of_kept_channels_are_repaired(name: str, form: RefitForm) -> None:
    model, plan = with_combination(name)
    batches = in_batches(random_images(400, seed=3), size=50)
    settings = RefitSection(positions=32, form=form)
    smaller, results = cut_and_refit(model, plan, batches, settings)
    assert error_on_new_images(model, cut_only(model, plan)) > 1e-2
    assert error_on_new_images(model, smaller) < 1e-4
    assert_finite(smaller, results)
    assert all(result.error_refit <= result.error_cut for result in results)
    has_patches = not name.startswith("transposed")
    expected = "patch" if form == "patch" and has_patches else "channel"
    assert results[0].form == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*NETWORKS, *CONSUMERS])
def test_no_consumer_gets_worse(name: str, form: RefitForm) -> None:
    torch.manual_seed(11)
    model = make_network(name) if name in NETWORKS else Consumer(CONSUMERS[name]).eval()
    dependencies = graph_of(model)
    plan = random_plan(dependencies, torch.Generator().manual_seed(5))
    smaller, results = cut_and_refit(model, plan, settings=RefitSection(positions=5, form=form))
    assert bool(results) == bool(plan.removed)
    assert_finite(smaller, results)
    assert all(result.error_refit <= result.error_cut for result in results)
    assert not any(result.note for result in results)


def test_groups_that_went_are_not_read() -> None:
    """Of a convolution in four groups of two whole groups go; its answers can be met exactly."""
    torch.manual_seed(11)
    model = Consumer(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4)).eval()
    dependencies = graph_of(model)
    (group,) = [name for name in dependencies.groups if name.startswith("stem")]
    assert len(dependencies.groups[group]) == 4
    plan = PruningPlan({group: (1,)}, Budget("macs", 0.5), "test")
    for form in FORMS:
        settings = RefitSection(positions=16, form=form, joint=False)
        smaller, results = cut_and_refit(model, plan, settings=settings)
        assert [result.layer for result in results] == ["linear"]
        assert torch.equal(
            smaller.get_parameter("body.weight"),
            model.get_parameter("body.weight")[[0, 1, 4, 5, 6, 7]],
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [6, 2])
def test_a_grouped_kernel_behind_the_first_cut_is_estimated(groups: int, form: RefitForm) -> None:
    model = Separable(groups).eval()
    settings = RefitSection(positions=64, form=form)
    smaller, results = cut_and_refit(model, plan_of(stem=(2,)), settings=settings)
    (spatial,) = [result for result in results if result.layer == "spatial"]
    assert spatial.ridge is not None
    assert spatial.error_refit < spatial.error_cut
    assert not torch.equal(smaller.get_parameter("spatial.weight"), model.spatial.weight)


class Separable(nn.Module):
    """A depthwise or grouped convolution *behind* the first cut, as in MobileNet's blocks."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.spatial = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
        self.project = nn.Conv2d(6, 5, 1)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.pointwise(F.relu(self.stem(images))))
        x = F.relu(self.project(F.relu(self.spatial(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "layer"), [("shared", "twice"), ("tied_weights", "one")])
def test_a_kernel_used_twice_is_estimated_once_from_both_uses(
    name: str, layer: str, form: RefitForm
) -> None:
    model = make_network(name)
    duplicate(model.get_submodule("stem.0"), model.get_submodule("stem.1"), 0, 1)
    if name == "shared":  # its filters are its own inputs
        with torch.no_grad():
            for tensor in tensors_of(model.get_submodule("twice")).values():
                tensor[1] = tensor[0]
    (group,) = [group for group in graph_of(model).groups if group.startswith(("stem", "twice"))][
        :1
    ]
    plan = PruningPlan({group: (1,)}, Budget("macs", 0.5), "test")
    smaller, results = cut_and_refit(model, plan, settings=RefitSection(positions=64, form=form))
    (mine,) = [result for result in results if result.layer == layer]
    assert mine.ridge is not None
    assert mine.error_refit < 0.1 * mine.error_cut
    assert error_on_new_images(model, smaller) < 0.5 * error_on_new_images(
        model, cut_only(model, plan)
    )


def test_a_layer_that_reads_too_much_is_estimated_by_channels() -> None:
    torch.manual_seed(11)
    model = Consumer(lambda: nn.Conv2d(8, 256, 3, padding=1)).eval()
    plan = plan_of(stem=(0,))
    _, results = cut_and_refit(model, plan, settings=RefitSection(positions=8, memory_mib=1))
    assert results[0].form == "channel"
    assert results[0].ridge is not None
    _, results = cut_and_refit(model, plan, settings=RefitSection(positions=8))
    assert results[0].form == "patch"


class Standardised(nn.Module):
    """A convolution whose kernel is computed, behind a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 5, 3, padding=1)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        weight = self.conv.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(x, weight, self.conv.bias, padding=1))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def test_a_computed_kernel_is_left_with_a_note() -> None:
    model = Standardised().eval()
    plan = plan_of(stem=(0,))
    smaller, results = cut_and_refit(model, plan)
    assert results[0] == LayerRefit("conv", 0.0, 0.0, None, "its kernel is computed in the forward")
    cut = cut_only(model, plan)
    assert torch.equal(smaller.get_parameter("conv.weight"), cut.get_parameter("conv.weight"))
    assert results[1].layer == "linear"
    assert results[1].ridge is not None


def test_a_constant_channel_can_be_removed_without_a_change() -> None:
    model = make_network("chain")
    with torch.no_grad():
        for tensor in tensors_of(model.get_submodule("bn1")).values():
            if tensor.dim():
                tensor[2] = 0.0
        model.get_parameter("bn1.bias")[2] = -1.0  # zero behind the rectifier
        model.get_buffer("bn1.running_var")[2] = 1.0
    for form in FORMS:
        smaller, results = cut_and_refit(
            model, plan_of(conv1=(2,)), settings=RefitSection(positions=8, form=form)
        )
        assert [result.layer for result in results] == ["conv2", "linear"]
        assert error_on_new_images(model, smaller) < 1e-6


# --- errors behind a rectifier --------------------------------------------------------------------


def test_targets_are_renewed_where_the_rectifier_is_off(generator: torch.Generator) -> None:
    wanted, level, output_now = torch.randn(3, 40, 6, generator=generator)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    renewed = RegressionTargets(wanted, level, sign).renewed(output_now)
    for row in range(40):
        for output in range(6):
            t, n, z = (float(values[row, output]) for values in (wanted, level, output_now))
            if sign[output] < 0:
                t, n, z = -t, -n, -z
            expected = t if t > n else min(z, n)
            assert float(sign[output] * renewed[row, output]) == expected


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_where_a_rectifier_turns_on_is_known(name: str) -> None:
    """A layer's output, less its bias, is at the level where the rectifier reads a zero."""
    model = make_network(name)
    with torch.no_grad():  # norms that turn a channel over, too
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[1] *= -1.0
    dependencies, images = graph_of(model), random_images(4)
    state = tensors_of(model)
    kept = KeptChannels(dependencies, {})
    seen = 0
    for layer in dependencies.layers:
        target = target_layer(refit_layer(layer, kept))
        if not target.rectified:
            continue
        full, cut = (GraphInterpreter(dependencies.graph, state, images) for _ in range(2))
        full.advance(layer.node)
        cut.advance(layer.node)
        positions = torch.arange(target.layer.positions).expand(4, -1)
        targets = target.at(full, cut, state, positions)
        last = target.sum or target.norm
        assert last is not None
        value = GraphInterpreter(dependencies.graph, state, images).step(last)
        rectified = targets.rectified(targets.wanted) > 0
        expected = value.flatten(2).movedim(1, -1)
        assert torch.equal(rectified[expected.abs() > 1e-4], (expected > 0)[expected.abs() > 1e-4])
        seen += 1
    assert seen == {"chain": 2, "residual": 5}[name]


def test_errors_behind_the_rectifier_get_smaller() -> None:
    model = chain()
    with torch.no_grad():
        model.bn2.bias.sub_(1.5)  # mostly off
    plan = plan_of(conv1=(1, 4))
    batches = in_batches(random_images(400, seed=3), 100)
    images = random_images(200, seed=99)
    errors = {}
    for rectified in (False, True):
        settings = RefitSection(positions=16, rectified=rectified, joint=False)
        smaller, _ = cut_and_refit(model, plan, batches, settings)
        assert isinstance(smaller, Chain)
        with torch.no_grad():
            wanted, outputs = (
                F.relu(net.bn2(net.conv2(F.relu(net.bn1(net.conv1(images))))))
                for net in (model, smaller)
            )
        errors[rectified] = float((wanted - outputs).square().mean())
    assert errors[True] < 0.98 * errors[False]


# --- batches, processes and memory ----------------------------------------------------------------

FEW = RefitSection(positions=5)


def assert_almost_equal(one: nn.Module, other: nn.Module) -> None:
    """Equal up to the rounding of float64 sums that are stored as float32."""
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["residual", "depthwise", "view_rest"])
def test_the_size_of_batches_makes_no_difference(
    name: str, form: RefitForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", 16)
    model = make_network(name)
    plan, settings = half_of(graph_of(model)), RefitSection(positions=5, form=form)
    images = random_images(75, seed=3)
    whole, expected = cut_and_refit(model, plan, in_batches(images, 100), settings)
    for size in (1, 7):
        smaller, results = cut_and_refit(model, plan, in_batches(images, size), settings)
        assert_almost_equal(smaller, whole)
        for result, other in zip(results, expected, strict=True):
            assert result.ridge == other.ridge
            assert result.error_refit == pytest.approx(other.error_refit, rel=1e-6, abs=1e-12)


def share_of(images: Tensor, rank: int, size: int) -> list[Batch]:
    (batch,) = in_batches(images, len(images))
    return [Batch(batch.images[rank::size], batch.labels[rank::size], batch.indices[rank::size])]


def work(rank: int, folder: Path) -> None:
    """One of two processes, each with every other image."""
    torch.set_num_threads(1)
    batching.MOST_IMAGES_AT_A_TIME = 16
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    for form in FORMS:
        model = make_network("residual")
        share = share_of(random_images(75, seed=3), rank, 2)
        settings = RefitSection(positions=5, form=form)
        smaller, _ = cut_and_refit(model, half_of(graph_of(model)), share, settings)
        torch.save(smaller.state_dict(), folder / f"{form}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_number_of_processes_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", 16)
    side_by_side(work, 2, tmp_path)
    model = make_network("residual")
    for form in FORMS:
        settings = RefitSection(positions=5, form=form)
        batches = in_batches(random_images(75, seed=3))
        alone, _ = cut_and_refit(model, half_of(graph_of(model)), batches, settings)
        results = [torch.load(tmp_path / f"{form}_{rank}.pt") for rank in range(2)]
        for name, tensor in alone.state_dict().items():
            assert torch.equal(results[0][name], results[1][name]), name
            # Blocks of products are in float32, and another number of processes has other blocks.
            torch.testing.assert_close(results[0][name], tensor, rtol=1e-3, atol=1e-4)


def test_no_image_is_an_error() -> None:
    with pytest.raises(DataError, match="no calibration images"):
        cut_and_refit(make_network("chain"), plan_of(conv1=(0,)), [])


def test_with_fewer_than_five_images_all_are_fitted() -> None:
    model = chain()
    duplicate(model.conv1, model.bn1, 1, 4)
    batches = in_batches(random_images(4, seed=3))
    smaller, results = cut_and_refit(model, plan_of(conv1=(4,)), batches)
    assert_finite(smaller, results)
    assert results[0].error_refit < 1e-3 * results[0].error_cut


class Wide(nn.Module):
    """Maps that are large next to a mebibyte."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
        )
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.features(images)
        first, second = x.split(16, 1)
        logits: Tensor = self.linear(torch.cat([first * 2, second], 1).mean((2, 3)))
        return logits


def test_patches_that_do_not_fit_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_network("residual")
    batches = in_batches(random_images(75, seed=3))
    inside, _ = cut_and_refit(model, half_of(graph_of(model)), batches, RefitSection(positions=5))
    monkeypatch.setattr(patch_regression.RowCounts, "keeps_fitted", property(lambda _: False))
    monkeypatch.setattr(patch_regression.RowCounts, "is_dual", property(lambda _: False))
    again, _ = cut_and_refit(model, half_of(graph_of(model)), batches, RefitSection(positions=5))
    for name, tensor in inside.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_rows_stay_in_memory_as_far_as_it_allows() -> None:
    counts = patch_regression.RowCounts(32_000, 8_000, 1, 1152, 128, 2**31)
    assert not counts.is_dual
    assert counts.fits
    assert counts.keeps_fitted
    assert counts.compared_every == 1
    assert replace(counts, held_out=12_800).compared_every == 3  # 4,267 rows are enough
    tight = replace(counts, limit_bytes=2**27)
    assert tight.fits
    assert not tight.keeps_fitted
    assert tight.compared_every == 2  # 49 MB of held-out rows, and room for 34
    assert not replace(counts, limit_bytes=2**20).fits
    few = replace(counts, fitted=200, held_out=50)
    assert few.is_dual
    assert few.sum_bytes < counts.sum_bytes / 3


def test_few_images_give_more_positions_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as all images together need."""
    model, plan = chain(), plan_of(conv1=(0, 3))
    count = sum(len(batch.images) for batch in CALIBRATION)
    by_number = {}
    for fewest in (1, 10 * count, 10**6):
        monkeypatch.setattr(layerwise, "FEWEST_POSITIONS", fewest)
        network, _ = cut_and_refit(model, plan, settings=RefitSection(positions=3))
        by_number[fewest] = state_of(network)
    monkeypatch.setattr(layerwise, "FEWEST_POSITIONS", 1)
    for fewest, positions in ((1, 3), (10 * count, 10), (10**6, 10_000)):
        expected, _ = cut_and_refit(model, plan, settings=RefitSection(positions=positions))
        assert_same_state(expected, by_number[fewest])
    assert not torch.equal(by_number[1]["conv2.weight"], by_number[10**6]["conv2.weight"])


def test_activations_beyond_the_bound_come_back_from_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batching, "MOST_IMAGES_AT_A_TIME", 16)
    monkeypatch.setattr(patch_regression.RowCounts, "fits", True)
    monkeypatch.setattr(layerwise, "FEWEST_POSITIONS", 1)
    saved: list[Path] = []
    save = torch.save

    def noting(values: object, path: Path) -> None:
        saved.append(path)
        save(values, path)

    monkeypatch.setattr(torch, "save", noting)
    model = Wide().eval()
    plan = plan_of(features__0=(0, 5, 9))
    inside, _ = cut_and_refit(model, plan, settings=FEW)
    assert not saved
    outside, _ = cut_and_refit(model, plan, settings=RefitSection(positions=5, memory_mib=1))
    assert saved
    assert not any(path.exists() for path in saved)
    assert_same_state(outside, state_of(inside))


# --- rank-deficient data --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["few images", "constant", "dead", "duplicate"])
def test_data_that_determine_no_kernel_do_no_harm(kind: str, form: RefitForm) -> None:
    model = chain()
    with torch.no_grad():
        if kind == "constant":
            model.bn1.weight[[1, 3]] = 0.0
            model.bn1.bias[[1, 3]] = 1.0
        elif kind == "dead":
            model.bn1.weight[[1, 3]] = 0.0
            model.bn1.bias[[1, 3]] = -1.0
        elif kind == "duplicate":
            duplicate(model.conv1, model.bn1, 0, 1)
            duplicate(model.conv1, model.bn1, 0, 3)
    images = random_images(2 if kind == "few images" else 60, seed=3)
    settings = RefitSection(positions=4, form=form)
    smaller, results = cut_and_refit(model, plan_of(conv1=(2, 5)), in_batches(images), settings)
    assert_finite(smaller, results)
    assert [result.layer for result in results] == ["conv2", "linear"]
    assert all(result.error_refit <= result.error_cut for result in results)
    with torch.no_grad():
        assert torch.isfinite(smaller(random_images(4))).all()


# --- layers without a place for an offset ---------------------------------------------------------


class BatchStatistics(nn.Module):
    """A norm that keeps no running statistics: there is no running mean to put an offset in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5, track_running_stats=False)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv2(F.relu(self.conv1(images)))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def test_a_norm_without_running_statistics_cannot_hold_an_offset() -> None:
    model = BatchStatistics().eval()
    duplicate(model.conv1, nn.Identity(), 0, 2)
    smaller, _ = cut_and_refit(model, plan_of(conv1=(2,)))
    assert error_on_new_images(model, smaller) < 1e-4
