"""Building a dependency graph: excluded layers, verified groups, and an unchanged network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import Chain, assert_cut_is_equivalent, make_network, random_images, random_plan
from secateur.config import Budget
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.pruning.apply import check_plan
from secateur.pruning.plan import PruningPlan, make_plan
from secateur.runtime.errors import RunFolderError, UnknownName


def any_plan(dependencies: DependencyGraph) -> PruningPlan:
    return random_plan(dependencies, torch.Generator().manual_seed(0))


def test_excluded_layers_keep_their_filters_and_name_the_pattern() -> None:
    dependencies = build_dependency_graph(
        make_network("concat"), random_images(1), exclude=("left.*", "join.0")
    )
    assert list(dependencies.groups) == ["stem.0", "right.0"]
    reasons = {group.name: group.reason for group in dependencies.frozen}
    assert reasons["left.0"] == "excluded by 'left.*'"
    assert reasons["join.0"] == "excluded by 'join.0'"


def test_a_pattern_that_fits_no_layer_is_an_error_that_names_near_ones() -> None:
    with pytest.raises(UnknownName, match="layer to exclude 'con1': did you mean conv1"):
        build_dependency_graph(Chain().eval(), random_images(1), exclude=("con1",))


class Split(nn.Module):
    """Half of the channels pass a convolution; how many is an attribute of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.sizes = [3, 5]
        self.inner = nn.Conv2d(3, 4, 3, padding=1)
        self.outer = nn.Conv2d(9, 6, 1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.split(F.relu(self.stem(x)), self.sizes, 1)
        x = self.outer(torch.cat([self.inner(one), other], 1))
        return self.linear(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_attributes_that_hold_a_size_follow_the_cut() -> None:
    model = Split().eval()
    dependencies = build_dependency_graph(model, random_images(1))
    assert list(dependencies.groups) == ["stem", "inner", "outer"]
    plan = PruningPlan({"stem": (0, 4, 7), "inner": (1,)}, Budget("macs", 0.5), "by hand")
    cut = assert_cut_is_equivalent(model, dependencies, plan, random_images())
    assert isinstance(cut, Split)
    assert cut.sizes == [2, 3]
    assert model.sizes == [3, 5]


def test_a_piece_of_a_split_is_never_emptied() -> None:
    dependencies = build_dependency_graph(Split().eval(), random_images(1))
    stem = dependencies.groups["stem"].channels
    covered = [set(cover.tolist()) for cover in dependencies.covers]
    assert set(stem[:3].tolist()) in covered
    assert set(stem[3:].tolist()) in covered
    scores = {name: torch.arange(len(group)).float() for name, group in dependencies.groups.items()}
    plan = make_plan(scores, dependencies, Budget("macs", 0.35), "by hand")
    assert 0 < sum(number < 3 for number in plan.removed["stem"]) < 3
    with pytest.raises(RunFolderError, match="removes all channels of a part of 'stem'"):
        check_plan(dependencies, PruningPlan({"stem": (0, 1, 2)}, Budget("macs", 0.5), "by hand"))


class Cached(nn.Module):
    """Keeps what it computed for the next call, as attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(6, 5)
        self.bias = nn.Parameter(torch.randn(5, 5))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.sum(0)
        return self.linear(self.conv(x).relu().mean((2, 3))) + self.cache["bias"]  # type: ignore[no-any-return]


def test_tensors_that_a_network_stores_while_traced_are_removed() -> None:
    model = Cached().eval()
    dependencies = build_dependency_graph(model, random_images(1))
    assert model.cache == {}
    assert list(dependencies.groups) == ["conv"]
    assert_cut_is_equivalent(model, dependencies, any_plan(dependencies), random_images())


class Aside(nn.Module):
    """A stage that several blocks add to, and a branch that joins by a sum without a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x))
        return self.linear(F.relu(self.left(x) + self.right(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_only_sums_around_layers_are_skip_connections() -> None:
    model = Aside().eval()
    assert list(build_dependency_graph(model, random_images(1)).groups) == ["left"]
    dependencies = build_dependency_graph(model, random_images(1), prune_residual=True)
    assert list(dependencies.groups) == ["stem", "left"]
    assert_cut_is_equivalent(model, dependencies, any_plan(dependencies), random_images())


class TwoPieces(nn.Module):
    """Splits into two pieces whose size is one attribute, as Ultralytics' C2PSA does."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.stem = nn.Conv2d(3, 16, 3)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.relu(self.stem(x)).split((self.c, self.c), 1)
        logits: Tensor = self.head(torch.cat([one, other, F.relu(self.inner(other))], 1))
        return logits.mean((2, 3))


def test_pieces_of_a_split_that_one_attribute_sizes_are_cut_alike() -> None:
    model = TwoPieces().eval()
    dependencies = build_dependency_graph(model, random_images(2))
    assert list(dependencies.groups) == ["stem", "inner"]
    assert len(dependencies.groups["stem"]) == 8
    plan = random_plan(dependencies, torch.Generator().manual_seed(0))
    smaller = assert_cut_is_equivalent(model, dependencies, plan, random_images(3))
    assert smaller.c == 8 - len(plan.removed["stem"])
