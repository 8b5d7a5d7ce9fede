from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import (
    NETWORKS,
    Chain,
    Flattened,
    TiedWeights,
    assert_cut_is_equivalent,
    counted_macs,
    random_images,
    random_plan,
    randomise_norms,
    wired,
)
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import NOT_PRUNABLE, RESIDUAL, DependencyGraph, aliases_of
from secateur.graph.interpreter import run
from secateur.graph.module_state import tensors_of
from secateur.graph.network_graph import operation_name
from secateur.graph.rules import RULES
from secateur.models.divergence import relative_error
from secateur.pruning.apply import apply_plan
from secateur.pruning.equivalence import masked_network

OUTPUT = "written to the network's output"

GROUPS = {
    "chain": {"conv1": 6, "conv2": 7},
    "residual": {"conv1.0": 4, "conv3.0": 5},
    "concat": {"stem.0": 4, "left.0": 5, "right.0": 3, "join.0": 6},
    "depthwise": {"expand.0": 6, "project": 4},
    "flattened": {"features.0.0": 6, "hidden": 7},
    "shared": {"stem.0": 5, "last": 4},
    "tied_weights": {"stem.0": 4, "one": 6},
    "in_place": {"conv1.0": 5},
    "grouped": {"stem.0": 3, "grouped.0": 4, "last.0": 7},
    "channel_pad": {"conv1": 7},
    "view_rest": {"conv.0": 6},
    "view_fixed": {"stem.0": 4},
    "gated": {"conv.0": 6, "squeeze": 3},
}
RESIDUAL_GROUPS = {
    "residual": {"stem.0": 6},
    "in_place": {"stem.0": 6},
    "channel_pad": {"stem.0": 4},
}
PADDED = "padded with channels of zeros in the network's code"
FROZEN = {
    "residual": {"stem.0": RESIDUAL},
    "in_place": {"stem.0": RESIDUAL},
    "channel_pad": {"stem.0": RESIDUAL, "stem.0 (2)": PADDED},
    "view_fixed": {"conv.0": "sized by a number in the network's code (view in ViewFixed)"},
}


class Between(nn.Module):
    """conv - something of a test's own - conv - mean - linear."""

    def __init__(self, then: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.other = nn.Conv2d(6, 6, 3, padding=1)
        self.to_one = nn.Conv2d(6, 1, 1)
        self.grouped = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.from_twelve = nn.Conv2d(12, 6, 1)
        self.from_nine = nn.Conv2d(9, 6, 1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.group_norm = nn.GroupNorm(2, 6)
        self.prelu = nn.PReLU(6)
        self.positions = nn.Linear(64, 10)
        self.more_positions = nn.Linear(64, 64)
        self.wider = nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.linear = nn.Linear(4, 5)
        self.register_buffer("shift", torch.rand(1, 6, 1, 1))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        x = self.then(self, self.first(x))
        logits: Tensor = self.linear(self.second(x).mean((2, 3)))
        return logits


def between(then: Callable[[Between, Tensor], Tensor]) -> tuple[Between, DependencyGraph]:
    model = Between(then).eval()
    return model, build_dependency_graph(model, random_images(2), prune_residual=True)


def assert_any_cut(
    model: nn.Module, dependencies: DependencyGraph, generator: torch.Generator
) -> None:
    assert_cut_is_equivalent(
        model, dependencies, random_plan(dependencies, generator), random_images()
    )


@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_the_known_ones(name: str, prune_residual: bool) -> None:
    dependencies = wired(name, prune_residual)[1]
    expected = {
        **GROUPS[name],
        **(RESIDUAL_GROUPS.get(name, {}) if prune_residual else {}),
    }
    assert {group.name: len(group) for group in dependencies.groups.values()} == expected
    assert list(dependencies.groups) == [group.name for group in dependencies.groups.values()]


@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_channels_carry_the_reason(name: str, prune_residual: bool) -> None:
    dependencies = wired(name, prune_residual)[1]
    reasons = {"linear": OUTPUT, **FROZEN.get(name, {})}
    if prune_residual:
        reasons = {layer: why for layer, why in reasons.items() if why != RESIDUAL}
    reason_of: dict[str, str] = {}
    for group in dependencies.frozen:
        reason_of[f"{group.name} (2)" if group.name in reason_of else group.name] = group.cause
    if prune_residual and name == "channel_pad":
        reasons = {"stem.0": PADDED, "linear": OUTPUT}
    assert reason_of == reasons


@pytest.mark.parametrize("name", NETWORKS)
def test_every_filter_is_in_one_group_or_frozen(name: str) -> None:
    dependencies = wired(name)[1]
    channels = np.concatenate([group.channels for group in dependencies.groups.values()])
    assert len(np.unique(channels)) == len(channels)
    written = {layer.weight for layer in dependencies.layers}
    cut = {layer.weight for group in dependencies.groups.values() for layer in group.layers}
    frozen = {layer.weight for layer in dependencies.layers if layer.weight not in cut}
    assert cut | frozen == written
    for weight in frozen:
        assert not any(slots.tensor == weight and slots.dim == 0 for slots in dependencies.slots)


@pytest.mark.parametrize(
    ("name", "group", "producers", "consumers"),
    [
        ("residual", "stem.0", {"stem.0", "conv2.0", "conv4.0"}, {"conv1.0", "conv3.0", "linear"}),
        ("concat", "stem.0", {"stem.0"}, {"left.0", "right.0", "linear"}),
        ("concat", "right.0", {"right.0"}, {"join.0"}),
        ("depthwise", "expand.0", {"expand.0", "depthwise.0"}, {"project"}),
        ("shared", "stem.0", {"stem.0", "twice"}, {"twice", "last"}),
        ("gated", "conv.0", {"conv.0", "excite"}, {"squeeze", "linear"}),
        ("flattened", "features.0.0", {"features.0.0"}, {"hidden"}),
    ],
)
def test_a_group_knows_its_producers_and_consumers(
    name: str, group: str, producers: set[str], consumers: set[str]
) -> None:
    coupled = wired(name, True)[1].groups[group]
    assert {layer.name for layer in coupled.layers} == producers
    assert {consumer.layer for consumer in coupled.consumers} == consumers


def test_a_tap_is_where_a_group_still_has_positions() -> None:
    for name in NETWORKS:
        for group in wired(name, True)[1].groups.values():
            if group.name == "hidden":
                continue
            (tap,) = group.taps
            shape = tap.node.meta["val"].shape
            assert len(shape) == 4, (name, group.name)
            assert operation_name(tap.node) not in {"flatten", "view", "mean"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tap_holds_each_channel_where_its_index_says(name: str) -> None:
    """Another kernel for filter i shows at place `index[i]`, and at no other channel's."""
    model, dependencies = wired(name, True)
    for group in dependencies.groups.values():
        seen: list[Tensor] = []
        weight = group.layers[0].weight
        (tap,) = group.taps
        if len(tap.index) > len(group):
            continue
        for changed in (None, *range(len(group))):
            state = dict(tensors_of(model))
            if changed is not None:
                kernel = state[weight].clone()
                kernel[
                    dependencies.channel_of[group.layers[0].produced] == group.channels[changed]
                ] += 1
                state[weight] = kernel
            run(dependencies.graph, state, random_images(), after={tap.node: seen.append})
        plain, *others = (value.transpose(0, tap.dim).flatten(1)[tap.index] for value in seen)
        for changed, other in enumerate(others):
            differs = (plain != other).any(1).nonzero()[:, 0]
            assert differs.tolist() == [changed]


def test_joined_branches_follow_one_another() -> None:
    dependencies = wired("concat")[1]
    left, right = dependencies.groups["left.0"], dependencies.groups["right.0"]
    assert left.taps[0].node is right.taps[0].node
    assert left.taps[0].index.tolist() == [0, 1, 2, 3, 4]
    assert right.taps[0].index.tolist() == [5, 6, 7]


def test_a_flattened_channel_takes_all_its_positions_with_it() -> None:
    dependencies = wired("flattened")[1]
    indices = dependencies.kept_indices({"features.0.0": (1, 4)})
    kept = [channel * 8 + position for channel in (0, 2, 3, 5) for position in range(8)]
    assert indices["hidden.weight"][1].tolist() == kept
    assert indices["features.0.0.weight"][0].tolist() == [0, 2, 3, 5]
    assert indices["features.0.1.running_var"][0].tolist() == [0, 2, 3, 5]
    assert "linear.weight" not in indices


def test_kept_channels_are_all_but_the_removed_ones() -> None:
    dependencies = wired("chain")[1]
    kept = dependencies.kept_channels({"conv1": (0, 5)})
    group = dependencies.groups["conv1"]
    assert (~kept).sum() == 2
    assert kept[group.channels].tolist() == [False, True, True, True, True, False]
    assert dependencies.kept_channels({}).all()
    assert dependencies.kept_indices({}) == {}


def test_slots_mark_what_must_stay() -> None:
    dependencies = wired("view_fixed")[1]
    by_place = {(slots.tensor, slots.dim): slots.channels for slots in dependencies.slots}
    assert (by_place["stem.0.weight", 0] != NOT_PRUNABLE).all()
    assert ("stem.0.weight", 1) not in by_place
    assert ("linear.weight", 1) not in by_place


@pytest.mark.parametrize("prune_residual", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_that_pytorch_counts(
    name: str, prune_residual: bool, generator: torch.Generator
) -> None:
    model, dependencies = wired(name, prune_residual)
    plan, images = random_plan(dependencies, generator), random_images()
    assert dependencies.macs() == counted_macs(model, images)
    cut = apply_plan(model, dependencies, plan)
    assert dependencies.macs(plan.removed) == counted_macs(cut, images) < dependencies.macs()


@pytest.mark.parametrize("name", NETWORKS)
def test_params_are_those_of_the_network(name: str, generator: torch.Generator) -> None:
    model, dependencies = wired(name, True)
    plan = random_plan(dependencies, generator)
    assert dependencies.params() == sum(one.numel() for one in model.parameters())
    cut = apply_plan(model, dependencies, plan)
    assert dependencies.params(plan.removed) == sum(one.numel() for one in cut.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_after_a_cut_are_those_of_the_cut_network(
    name: str, generator: torch.Generator
) -> None:
    model, dependencies = wired(name, True)
    plan = random_plan(dependencies, generator)
    reasons = {
        name: tuple(one.shape)
        for name, one in apply_plan(model, dependencies, plan).state_dict().items()
    }
    shapes = dependencies.shapes_after(plan.removed)
    assert {name: shapes[name] for name in reasons} == reasons
    assert dependencies.shapes_after({}) == dependencies.shapes


def test_one_kernel_under_two_names_is_counted_once_and_cut_once() -> None:
    model, dependencies = wired("tied_weights")
    assert isinstance(model, TiedWeights)
    aliases = aliases_of(model)
    assert aliases["one.weight"] == aliases["other.weight"] == ("one.weight", "other.weight")
    (layer,) = dependencies.groups["one"].layers
    assert layer.weight in aliases["one.weight"]
    expected = 4 * 3 * 9 + 2 * 4 + 6 * 4 * 9 + 12 * 5 + 5
    assert dependencies.params() == expected


def _chunked(self: Between, x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=1)
    return torch.cat([left * right, right], dim=1)


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (
            lambda self, x: x.cumsum(1),
            r"channels matters, in cumsum\(\) at .*test_dependency.py:\d",
        ),
        (lambda self, x: x[:, [1, 0, 2, 4, 3, 5]], r"channels matters, in getitem\(\) at "),
        (lambda self, x: x.take(torch.arange(6)).mean() * x, "no rule for the operation 'take'"),
        (lambda self, x: x - x.mean(), "reduced over every dimension"),
        (
            lambda self, x: torch.cat([x[:, 3:], x[:, :3]], 1),
            r"sized by a number in the network's code \(slice in Between\)",
        ),
        (
            lambda self, x: x.view(-1, 6, 64).view(-1, 6, 8, 8),
            r"sized by a number in the network's code \(view in Between\)",
        ),
        (lambda self, x: x.flatten(0, 1).view(-1, 6, 8, 8), "which mixes dimensions"),
    ],
)
def test_unknown_operations_freeze_channels_with_the_reason(
    then: Callable[[Between, Tensor], Tensor], reason: str, generator: torch.Generator
) -> None:
    model, dependencies = between(then)
    assert "first" not in dependencies.groups
    (frozen,) = [group for group in dependencies.frozen if group.name == "first"]
    assert frozen.size == 6
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(frozen.reason)
    images, plan = random_images(), random_plan(dependencies, generator)
    assert "second" in plan.removed
    with torch.no_grad():
        cut = apply_plan(model, dependencies, plan)
        assert relative_error(cut(images), masked_network(model, dependencies, plan)(images)) < 1e-4


@pytest.mark.parametrize(
    "then",
    [
        lambda self, x: x * self.scale + self.shift * 3,
        lambda self, x: x * self.to_one(x).sigmoid(),
        lambda self, x: self.from_twelve(torch.cat([x, x.relu()], 1)),
        lambda self, x: torch.cat([x, -x], 2),
        lambda self, x: F.interpolate(x, scale_factor=2),
        lambda self, x: F.pad(x, (1, 2, 0, 1), value=3.0)[:, :, 1:, ::2],
        lambda self, x: F.avg_pool2d(x, 3, stride=1) / 2 - 1,
        lambda self, x: self.other(x.clone().detach()) + x.contiguous(),
        lambda self, x: x + self.other(self.other(x)),
        lambda self, x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)),
        lambda self, x: F.silu(x.clamp(-1, 1)).exp().abs(),
        lambda self, x: x.softmax(1),
        lambda self, x: self.group_norm(x),
        lambda self, x: self.prelu(x),
        lambda self, x: self.up(x),
        lambda self, x: x.permute(0, 1, 3, 2),
        lambda self, x: x * x.mean(1, keepdim=True),
        lambda self, x: self.from_twelve(self.grouped(x)),
        lambda self, x: F.conv2d(x, self.other.weight * 2, padding=1),
        _chunked,
    ],
)
def test_channels_of_known_operations_can_be_cut(
    then: Callable[[Between, Tensor], Tensor], generator: torch.Generator
) -> None:
    model, dependencies = between(then)
    assert {"first", "second"} <= set(dependencies.groups)
    assert_any_cut(model, dependencies, generator)


def test_channels_joined_with_the_networks_input_are_prunable(generator: torch.Generator) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)
            self.next = nn.Conv2d(9, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.next(torch.cat([self.conv(x), x], 1)).mean((2, 3))  # type: ignore[no-any-return]

    model = Joined().eval()
    dependencies = build_dependency_graph(model, random_images(2))
    assert list(dependencies.groups) == ["conv"]
    assert dependencies.kept_indices({"conv": (0,)})["next.weight"][1].tolist() == list(range(1, 9))
    assert_any_cut(model, dependencies, generator)


def test_a_layer_whose_output_is_unused_is_frozen() -> None:
    _, dependencies = between(lambda self, x: x * self.to_one(x))
    assert {"to_one": "one channel that is spread over others"}.items() <= {
        group.name: group.cause for group in dependencies.frozen
    }.items()


def test_adaptive_max_pooling_is_followed_as_the_table_of_rules_says() -> None:
    assert "adaptive_max_pool2d" in RULES
    _, dependencies = between(lambda self, x: F.adaptive_max_pool2d(x, 4))
    assert "first" in dependencies.groups


def test_a_view_that_merges_batch_and_channels_is_frozen(generator: torch.Generator) -> None:
    """`view(n * c, -1)` is no flattening of each image."""

    def then(self: Between, x: Tensor) -> Tensor:
        y: Tensor = self.more_positions(x.view(x.size(0) * x.size(1), -1))
        return y.view(-1, 6, 8, 8)

    model, dependencies = between(then)
    assert "first" not in dependencies.groups
    assert_any_cut(model, dependencies, generator)


def test_a_linear_layer_over_positions_costs_less_with_fewer_channels(
    generator: torch.Generator,
) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.positions = nn.Linear(64, 10)
            self.last = nn.Conv1d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.positions(self.conv(x).flatten(2)))
            return self.last(x).mean(2)  # type: ignore[no-any-return]

    model = Mixer().eval()
    assert_any_cut(model, build_dependency_graph(model, random_images(2)), generator)


def test_channels_along_the_width_are_frozen_where_a_convolution_mixes_them(
    generator: torch.Generator,
) -> None:
    class Width(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.wider = nn.Linear(8, 10)
            self.narrower = nn.Linear(10, 7)
            self.last = nn.Conv2d(6, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.wider(self.conv(x))
            return self.last(x).mean((2, 3)) + self.last(self.narrower(x)).mean((2, 3))  # type: ignore[no-any-return]

    model = Width().eval()
    dependencies = build_dependency_graph(model, random_images(2))
    assert "wider" not in dependencies.groups
    assert_any_cut(model, dependencies, generator)


def test_a_group_of_which_the_first_consumer_reads_a_part(generator: torch.Generator) -> None:
    """Two branches coupled by a sum; the first consumer reads only one of them."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
            self.only_left = nn.Conv2d(3, 4, 1)
            self.whole = nn.Conv2d(3, 8, 1)
            self.after = nn.Conv2d(8, 4, 1)
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            left, right = F.relu(self.left(x)), F.relu(self.right(x))
            aside = self.only_left(left)
            both = self.whole(x) + torch.cat([left, right], 1)
            return self.linear((aside + self.after(both)).mean((2, 3)))  # type: ignore[no-any-return]

    model = Parts().eval()
    dependencies = build_dependency_graph(model, random_images(2), prune_residual=True)
    assert_any_cut(model, dependencies, generator)


def test_a_transposed_convolution_is_a_convolution_and_counted() -> None:
    model, dependencies = between(lambda self, x: self.up(x))
    assert dependencies.macs() == counted_macs(model, random_images())


def test_building_the_graph_leaves_the_network_as_it_was(generator: torch.Generator) -> None:
    model = Flattened()
    randomise_norms(model, generator)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_dependency_graph(model, random_images(2))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_images_size_decides_the_macs_and_not_the_batch() -> None:
    model = Chain().eval()
    small, large = random_images(2), random_images(5, side=16)
    dependencies = build_dependency_graph(model, large)
    assert dependencies.macs() == counted_macs(model, large)
    convolutions = build_dependency_graph(model, small).macs() - 7 * 5
    assert dependencies.macs() - 7 * 5 == 4 * convolutions
