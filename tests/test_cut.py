from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import (
    NETWORKS,
    Chain,
    assert_cut_is_equivalent,
    counted_macs,
    make_network,
    random_images,
    random_plan,
    randomise_norms,
    wired,
)
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.models.divergence import relative_error
from secateur.models.zoo import load
from secateur.pruning.apply import apply_plan, check_plan
from secateur.pruning.equivalence import masked_network
from secateur.pruning.plan import PruningPlan
from secateur.runtime.errors import RunFolderError

TARGET = Budget("macs", 0.5)


def plan_of(removed: dict[str, tuple[int, ...]]) -> PruningPlan:
    return PruningPlan(removed, TARGET, "by hand")


@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_equals_the_masked_one(
    name: str, prune_residual: bool, generator: torch.Generator
) -> None:
    model, dependencies = wired(name, prune_residual)
    plan, images = random_plan(dependencies, generator), random_images()
    assert_cut_is_equivalent(model, dependencies, plan, images)
    with torch.no_grad():
        assert relative_error(apply_plan(model, dependencies, plan)(images), model(images)) > 5e-4


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.data())
def test_any_plan_gives_an_equivalent_network(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(NETWORKS)))
    model, dependencies = wired(name, data.draw(st.booleans()))
    removed = {
        group: tuple(
            sorted(
                data.draw(st.sets(st.integers(0, len(channels) - 1), max_size=len(channels) - 1))
            )
        )
        for group, channels in dependencies.groups.items()
    }
    plan = plan_of(removed)
    assert_cut_is_equivalent(model, dependencies, plan, random_images(2))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_filter_may_be_left_in_every_group(name: str) -> None:
    model, dependencies = wired(name, True)
    removed = {
        group: tuple(range(1, len(channels))) for group, channels in dependencies.groups.items()
    }
    assert_cut_is_equivalent(model, dependencies, plan_of(removed), random_images())


@cache
def wired_large(name: str, side: int, prune_residual: bool) -> tuple[nn.Module, DependencyGraph]:
    torch.manual_seed(3)
    model = load(name)
    randomise_norms(model, torch.Generator().manual_seed(3))
    return model, build_dependency_graph(
        model, random_images(2, side), prune_residual=prune_residual
    )


def assert_large(name: str, side: int, prune_residual: bool, generator: torch.Generator) -> None:
    model, dependencies = wired_large(name, side, prune_residual)
    images, plan = random_images(2, side), random_plan(dependencies, generator)
    assert_cut_is_equivalent(model, dependencies, plan, images)
    assert dependencies.macs() == counted_macs(model, images)
    cut = apply_plan(model, dependencies, plan)
    assert dependencies.macs(plan.removed) == counted_macs(cut, images) < dependencies.macs()
    assert dependencies.params(plan.removed) == sum(one.numel() for one in cut.parameters())
    with torch.no_grad():
        assert relative_error(cut(images), model(images)) > 1e-3


@pytest.mark.parametrize(
    ("name", "side", "prune_residual"),
    [
        ("resnet20", 32, False),
        ("resnet20", 32, True),
        ("vgg16_bn", 32, False),
        ("torchvision:resnet18", 64, False),
        ("torchvision:resnet18", 64, True),
    ],
)
def test_the_cut_is_equivalent_for_well_known_networks(
    name: str, side: int, prune_residual: bool, generator: torch.Generator
) -> None:
    assert_large(name, side, prune_residual, generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "prune_residual"),
    [
        ("resnet56", 32, True),
        ("torchvision:resnet50", 64, True),
        ("torchvision:vgg16_bn", 64, False),
    ],
)
def test_the_cut_is_equivalent_for_large_networks(
    name: str, side: int, prune_residual: bool, generator: torch.Generator
) -> None:
    assert_large(name, side, prune_residual, generator)


@pytest.mark.parametrize(
    ("name", "groups", "frozen"), [("resnet20", 9, 3), ("torchvision:resnet18", 8, 5)]
)
def test_inner_layers_of_blocks_are_prunable_and_residual_channels_frozen(
    name: str, groups: int, frozen: int
) -> None:
    """One group for each of the nine or eight blocks; stages and classes are frozen."""
    dependencies = wired_large(name, 32 if name == "resnet20" else 64, False)[1]
    assert len(dependencies.groups) == groups
    assert all(group.name.endswith("conv1") for group in dependencies.groups.values())
    assert len(dependencies.frozen) == frozen


def test_every_convolution_of_vgg_is_a_group() -> None:
    dependencies = wired_large("vgg16_bn", 32, False)[1]
    assert len(dependencies.groups) == 13
    assert [group.name for group in dependencies.frozen] == ["classifier"]


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_nothing_changes_nothing(name: str) -> None:
    model, dependencies = wired(name, True)
    same, images = apply_plan(model, dependencies, plan_of({})), random_images()
    with torch.no_grad():
        assert torch.equal(same(images), model(images))
        masked = masked_network(model, dependencies, plan_of({}))(images)
        assert relative_error(masked, model(images)) < 1e-6


def test_cutting_in_two_rounds_is_cutting_at_once() -> None:
    model, dependencies = wired("chain")
    images = random_images()
    at_once = apply_plan(model, dependencies, plan_of({"conv1": (1, 4), "conv2": (0, 2)}))
    first = apply_plan(model, dependencies, plan_of({"conv1": (1,), "conv2": (2,)}))
    again = build_dependency_graph(first, images)
    second = apply_plan(first, again, plan_of({"conv1": (3,), "conv2": (0,)}))
    with torch.no_grad():
        assert torch.equal(second(images), at_once(images))


def test_the_network_itself_is_not_touched(generator: torch.Generator) -> None:
    model = make_network("residual")
    dependencies = build_dependency_graph(model, random_images(2), prune_residual=True)
    before = copy.deepcopy(model.state_dict())
    shapes = {name: str(module) for name, module in model.named_modules()}
    cut = apply_plan(model, dependencies, random_plan(dependencies, generator))
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.fill_(7)
        for buffer in cut.buffers():
            buffer.fill_(7)
    assert {name: str(module) for name, module in model.named_modules()} == shapes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modes_are_kept() -> None:
    model = Chain().train()
    model.bn1.eval()
    dependencies = build_dependency_graph(model, random_images(2))
    cut = apply_plan(model, dependencies, plan_of({"conv1": (0,)}))
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in cut.named_modules()} == modes
    assert not cut.get_submodule("bn1").training


def test_hooks_are_kept() -> None:
    model = make_network("chain")
    dependencies = build_dependency_graph(model, random_images(2))
    seen: list[torch.Size] = []
    model.get_submodule("conv1").register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    apply_plan(model, dependencies, plan_of({"conv1": (0, 3)}))(random_images())
    assert seen == [(3, 4, 8, 8)]


def test_frozen_parameters_stay_frozen_and_trainable_ones_trainable() -> None:
    model = make_network("chain")
    for name in ("conv1.weight", "bn2.bias"):
        model.get_parameter(name).requires_grad_(False)
    dependencies = build_dependency_graph(model, random_images(2))
    cut = apply_plan(model, dependencies, plan_of({"conv1": (0,), "conv2": (1,)}))
    expected = {name: one.requires_grad for name, one in model.named_parameters()}
    assert {name: one.requires_grad for name, one in cut.named_parameters()} == expected
    cut(random_images()).sum().backward()
    assert all((one.grad is not None) == one.requires_grad for one in cut.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_of_numbers_is_kept(dtype: torch.dtype) -> None:
    model = make_network("chain").to(dtype)
    dependencies = build_dependency_graph(model, random_images(2).to(dtype))
    cut = apply_plan(model, dependencies, plan_of({"conv1": (0,), "conv2": (1, 2)}))
    expected = {name: one.dtype for name, one in model.state_dict().items()}
    assert {name: one.dtype for name, one in cut.state_dict().items()} == expected


def test_the_memory_format_is_kept() -> None:
    model: nn.Module = make_network("chain").to(memory_format=torch.channels_last)
    dependencies = build_dependency_graph(model, random_images(2))
    cut = apply_plan(model, dependencies, plan_of({"conv1": (0,), "conv2": (1, 2)}))
    for name in ("conv1.weight", "conv2.weight"):
        kernel = cut.get_parameter(name)
        assert kernel.is_contiguous(memory_format=torch.channels_last)
        assert not kernel.is_contiguous()
    plain = apply_plan(make_network("chain"), dependencies, plan_of({"conv1": (0,)}))
    assert all(one.is_contiguous() for one in plain.parameters())


def test_modules_state_their_new_sizes() -> None:
    model, dependencies = wired("depthwise")
    cut = apply_plan(model, dependencies, plan_of({"expand.0": (0, 1), "project": (3,)}))
    expand, depthwise = cut.get_submodule("expand.0"), cut.get_submodule("depthwise.0")
    project, norm = cut.get_submodule("project"), cut.get_submodule("depthwise.1")
    linear = cut.get_submodule("linear")
    assert isinstance(expand, nn.Conv2d)
    assert (expand.in_channels, expand.out_channels, expand.groups) == (3, 4, 1)
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    assert isinstance(project, nn.Conv2d)
    assert (project.in_channels, project.out_channels, project.groups) == (4, 3, 1)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 4
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (3, 5)


def test_a_convolution_of_one_channel_does_not_turn_depthwise() -> None:
    class OneChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Conv2d(3, 1, 3, padding=1)
            self.widen = nn.Conv2d(1, 6, 3, padding=1)
            self.linear = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(self.widen(self.narrow(x)).relu().mean((2, 3)))
            return logits

    model = OneChannel().eval()
    dependencies = build_dependency_graph(model, random_images(2))
    plan = plan_of({"widen": (0, 2)})
    widen = apply_plan(model, dependencies, plan).get_submodule("widen")
    assert isinstance(widen, nn.Conv2d)
    assert (widen.in_channels, widen.out_channels, widen.groups) == (1, 4, 1)
    assert_cut_is_equivalent(model, dependencies, plan, random_images())


def test_tied_kernels_stay_tied() -> None:
    model, dependencies = wired("tied_weights")
    cut = apply_plan(model, dependencies, plan_of({"one": (2, 5), "stem.0": (1,)}))
    assert cut.get_parameter("one.weight") is cut.get_parameter("other.weight")
    assert cut.get_parameter("one.weight").shape == (4, 3, 3, 3)


def test_a_state_dict_of_the_cut_network_fits_a_second_cut() -> None:
    model, dependencies = wired("concat")
    plan = plan_of({"left.0": (0, 4), "join.0": (1,)})
    saved = apply_plan(model, dependencies, plan).state_dict()
    other = apply_plan(make_network("concat", seed=5), dependencies, plan)
    other.load_state_dict(saved, strict=True)
    images = random_images()
    with torch.no_grad():
        assert torch.equal(other(images), apply_plan(model, dependencies, plan)(images))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nowhere": (0,)}, "cuts 'nowhere'"),
        ({"linear": (0,)}, "cuts 'linear'"),
        ({"conv1": (6,)}, "cuts filters that 'conv1' does not have"),
        ({"conv1": (-1,)}, "cuts filters that 'conv1' does not have"),
        ({"conv1": (0, 1, 2, 3, 4, 5)}, "cuts all 6 filters of 'conv1'"),
        ({"conv2": (1, 1)}, "cuts all 7 filters of 'conv2', or some twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    removed: dict[str, tuple[int, ...]], message: str
) -> None:
    model, dependencies = wired("chain")
    with pytest.raises(RunFolderError, match=message):
        check_plan(dependencies, plan_of(removed))
    with pytest.raises(RunFolderError, match=message):
        apply_plan(model, dependencies, plan_of(removed))


def test_a_masked_channel_is_zero_where_it_is_consumed() -> None:
    """By hand: the removed filter's scale and shift at 0 do the same in a chain without bias."""
    model, dependencies = wired("chain")
    by_hand, images = copy.deepcopy(model), random_images()
    with torch.no_grad():
        by_hand.get_parameter("bn1.weight")[2] = 0
        by_hand.get_parameter("bn1.bias")[2] = 0
        masked = masked_network(model, dependencies, plan_of({"conv1": (2,)}))(images)
        assert relative_error(masked, by_hand(images)) < 1e-6


def test_relative_error_is_the_largest_difference_over_the_largest_value() -> None:
    one = torch.tensor([1.0, -4.0])
    assert relative_error(one, one) == 0
    assert relative_error(torch.tensor([1.0, -3.0]), one) == pytest.approx(0.25)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
