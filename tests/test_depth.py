"""Depth: residual branches that are dropped, planned, cut, refitted, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

import secateur
from networks import make_network, random_images, randomise_norms
from secateur.config import Budget, PlanSection, RefitSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.dependency import DependencyGraph
from secateur.graph.factorisation import factorable_layers
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.module_state import tensors_of
from secateur.graph.residual_branches import (
    Constant,
    FirstChannel,
    ResidualBranch,
    residual_branches,
)
from secateur.models.cifar import CifarResNet
from secateur.models.divergence import relative_error
from secateur.pruning.actions import BRANCH_OF, Actions, BranchChoice, RankChoice
from secateur.pruning.allocation import SearchSpace, lowest_sensitivity
from secateur.pruning.cost.dropped import dropped_savings
from secateur.pruning.cost.latency_model import Hardware, LatencyTable, LayerTimes
from secateur.pruning.depth_sensitivity import droppable_branches, measure_depth_sensitivity
from secateur.pruning.equivalence import check_equivalence
from secateur.pruning.plan import Allocation, PruningPlan, make_plan
from secateur.pruning.refit.layers import refit_layer
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.pruning.refit.target_layers import target_layer
from secateur.runtime.errors import RunFolderError, TargetError, UsageError
from secateur.training.feature_distillation import residual_sums

Network = TypeVar("Network", bound=nn.Module)
DEPTH = {"plan.actions": ["depth"]}


def resnet() -> nn.Module:
    """CIFAR's ResNet with two blocks a stage; all but the first of the last two can be dropped."""
    torch.manual_seed(0)
    network = CifarResNet(14, 5).eval()
    randomise_norms(network, torch.Generator().manual_seed(0))
    return network


class Sequence(nn.Module):
    """A stem, some blocks, and a linear layer."""

    def __init__(self, *blocks: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks: nn.Sequential = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.blocks(self.stem(x).relu()).mean((2, 3)))
        return logits


class Scaled(nn.Module):
    """As in ConvNeXt: channels last inside, and a scale for each channel behind the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.gamma = nn.Parameter(torch.linspace(0.5, 2.0, 8))

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.mlp(self.norm(self.spatial(x).permute(0, 2, 3, 1)))
        return inner.permute(0, 3, 1, 2) * self.gamma.reshape(1, -1, 1, 1) + x


def seeded(network: Network) -> Network:
    randomise_norms(network, torch.Generator().manual_seed(0))
    return network.eval()


def branches_of(network: nn.Module) -> tuple[DependencyGraph, dict[str, ResidualBranch]]:
    dependencies = build_dependency_graph(network, random_images(2, 8))
    return dependencies, residual_branches(network, dependencies)


def plan_without(*names: str, removed: dict[str, tuple[int, ...]] | None = None) -> PruningPlan:
    return PruningPlan(removed or {}, Budget("macs", 0.5), "mine", dropped=names)


def macs_of(model: nn.Module) -> int:
    return build_dependency_graph(model, random_images(2, 8)).macs()


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


NETWORKS = {
    "resnet": (resnet, ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]),
    "basic": (lambda: Sequence(BasicBlock(8, 8), BasicBlock(8, 8)), ["blocks.0", "blocks.1"]),
    "bottleneck": (lambda: Sequence(Bottleneck(8, 2), Bottleneck(8, 2)), ["blocks.0", "blocks.1"]),
    "inverted": (
        lambda: Sequence(InvertedResidual(8, 8, 1, 3), InvertedResidual(8, 8, 2, 3)),
        ["blocks.0"],
    ),
    "scaled": (lambda: Sequence(Scaled(), Scaled()), ["blocks.0", "blocks.1"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dropped_branch_is_a_constant(name: str) -> None:
    make, names = NETWORKS[name]
    network = seeded(make())
    dependencies, branches = branches_of(network)
    assert list(branches) == names
    plan = plan_without(*names)
    before = copy.deepcopy(network.state_dict())
    smaller = secateur.apply_plan(network, dependencies, plan)
    for branch in branches.values():
        constant = smaller.get_submodule(branch.module)
        assert isinstance(constant, Constant)
        assert isinstance(constant.value, nn.Parameter)
        constant.value.data.uniform_(-1, 1)
        others = [smaller.get_submodule(other) for other in branch.others]
        assert {type(module) for module in others} <= {FirstChannel}
    images = random_images(3, 8)
    assert check_equivalence(network, dependencies, plan, smaller, images) < 1e-5
    assert network.state_dict().keys() == before.keys()
    for quantity, whole, left in (
        ("macs", macs_of(network), macs_of(smaller)),
        ("params", params_of(network), params_of(smaller)),
    ):
        savings = dropped_savings(dependencies, [*branches.values()], quantity)({})  # type: ignore[arg-type]
        assert whole - savings.sum() == left
        assert (savings > 0).all()
    assert smaller.train()(images).shape == (3, 5)  # and can be trained
    smaller(images).sum().backward()
    assert all(smaller.get_parameter(b.constant).grad is not None for b in branches.values())


def test_the_constant_is_what_the_branch_gives() -> None:
    network = seeded(Sequence(BasicBlock(8, 8)))
    dependencies, branches = branches_of(network)
    smaller = secateur.apply_plan(network, dependencies, plan_without("blocks.0"))
    constant = torch.arange(8.0)
    smaller.get_parameter("blocks.0.bn2.value").data.copy_(constant)
    images = random_images(3, 8)
    stem = network.get_submodule("stem")(images).relu()
    shifted = (stem + constant[:, None, None]).relu()
    expected = network.get_submodule("linear")(shifted.mean((2, 3)))
    assert torch.allclose(smaller(images), expected, atol=1e-5)
    assert branches["blocks.0"].others == ("blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2")


@pytest.mark.parametrize("name", ["basic", "inverted"])
def test_channels_last_in_memory_stay_so(name: str) -> None:
    network = seeded(NETWORKS[name][0]())
    dependencies, _ = branches_of(network)
    smaller = secateur.apply_plan(network, dependencies, plan_without("blocks.0"))
    for layout in (torch.channels_last, torch.contiguous_format):
        maps = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
        result = smaller.get_submodule("blocks.0")(maps)
        assert result.is_contiguous(memory_format=layout)


def test_modules_of_a_branch_that_write_in_place_leave_its_input_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(8, 8, 1)
            self.second = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(F.relu(self.first(x), inplace=True))
            out += x
            return out

    network = Sequence(InPlace())
    network.blocks[0].get_parameter("first.bias").data.fill_(-9)
    dependencies, branches = branches_of(network)
    smaller = secateur.apply_plan(network, dependencies, plan_without("blocks.0"))
    assert list(branches) == ["blocks.0"]
    images = random_images(3, 8) - 1
    smaller.get_submodule("stem").register_forward_hook(lambda *_: None)
    assert check_equivalence(network, dependencies, plan_without(*branches), smaller, images) < 1e-5


class Refused(nn.Module):
    """Blocks none of whose branches can be dropped; `kind` says why."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "another shortcut":
            return self.conv(x) + self.other(x)  # type: ignore[no-any-return]
        if self.kind == "read elsewhere":
            inner = self.conv(x)
            return (x + self.other(inner)) * inner.mean((2, 3), keepdim=True)  # type: ignore[no-any-return]
        if self.kind == "no module":
            inner = self.conv(x)
            return x + inner * inner.mean((2, 3), keepdim=True).sigmoid()  # type: ignore[no-any-return]
        if self.kind == "a difference":
            return x - self.conv(x)  # type: ignore[no-any-return]
        if self.kind == "broadcast":
            return x + self.conv(x).mean((2, 3), keepdim=True)  # type: ignore[no-any-return]
        if self.kind == "used again":
            return self.conv((x + self.conv(x)).relu())  # type: ignore[no-any-return]
        if self.kind == "another input":
            return self.other(x) + self.conv(x * self.other(x))  # type: ignore[no-any-return]
        if self.kind == "attention":
            query = x.flatten(2)
            weights = (query.mT @ query).softmax(-1)
            return x + self.conv((query @ weights).view_as(x))  # type: ignore[no-any-return]
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("another shortcut", "read elsewhere", "no module", "a difference", "broadcast"),
        *("used again", "another input", "attention"),
    ],
)
def test_branches_that_stay(kind: str) -> None:
    assert not branches_of(Sequence(Refused(kind)))[1]


def test_of_branches_inside_of_one_another_the_inner_ones_are_dropped() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8), nn.Conv2d(8, 8, 1))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.body(x)
            return out

    network = Sequence(Outer())
    dependencies, branches = branches_of(network)
    assert list(branches) == ["blocks.0.body.0", "blocks.0.body.1"]
    excluding = residual_branches(network, dependencies, ["*.body.1.conv2"])
    assert list(excluding) == ["blocks.0.body.0"]


def test_a_forward_that_needs_its_modules_keeps_its_branch() -> None:
    class ReadsSizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Conv2d(8, 4, 1)
            self.wide = nn.Conv2d(4, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.narrow(x)
            images, channels, height, width = inner.shape
            halves = inner.view(images, 2, channels // 2, height, width).sum(1)
            out: Tensor = x + self.wide(torch.cat([halves, halves], 1))
            return out

    network = Sequence(BasicBlock(8, 8), ReadsSizes(), BasicBlock(8, 8))
    dependencies, branches = branches_of(network)
    assert list(branches) == ["blocks.0", "blocks.1", "blocks.2"]
    images = random_images(2, 8)
    assert list(droppable_branches(network, dependencies, branches, images)) == [
        "blocks.0",
        "blocks.2",
    ]
    result = secateur.prune(network, random_images(40, 8), target=0.5, settings=DEPTH)
    assert set(result.plan.dropped) <= {"blocks.0", "blocks.2"}
    with pytest.raises(
        TargetError, match=r"with all residual branches dropped \(2\) \(add channels to the"
    ):
        secateur.prune(network, random_images(40, 8), target=0.1, settings=DEPTH)
    nothing = {**DEPTH, "plan.exclude": ["*"]}
    with pytest.raises(
        TargetError, match=r"1\.000 of the macs remain, with no convolution to split"
    ):
        secateur.prune(network, random_images(40, 8), target=0.5, settings=nothing)
    everything = {"plan.actions": ["channels", "rank", "depth"]}
    text = r"2 prunable groups, the lowest rank of all convolutions \(7\), all residual branches "
    with pytest.raises(TargetError, match=text):
        secateur.prune(network, random_images(40, 8), target=0.0001, settings=everything)


def test_the_layer_before_takes_over_what_the_branch_did() -> None:
    network = resnet()
    dependencies, branches = branches_of(network)
    dropped = [branches["layer1.0"], branches["layer1.1"], branches["layer3.1"]]
    kept = KeptChannels(dependencies, {}, dropped)
    goals = {}
    for layer in dependencies.layers:
        target = target_layer(refit_layer(layer, kept))
        if any(layer.node in branch.nodes for branch in dropped):
            continue
        if target.goal is not target.value_node:
            goals[layer.name] = target.goal
    # Of two dropped branches in a row the layer before takes over both.
    assert goals == {"conv1": branches["layer1.1"].sum, "layer3.0.conv2": branches["layer3.1"].sum}


def outputs_and_refit(names: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs of a network, of one without branches, and of that after the refit."""
    network = seeded(Sequence(*(BasicBlock(8, 8) for _ in range(3))))
    for block in network.blocks:
        block.get_parameter("bn2.weight").data.mul_(0.3)
    images = random_images(200, 8)
    dependencies, _ = branches_of(network)
    smaller = secateur.apply_plan(network, dependencies, plan_without(*names))
    with torch.no_grad():
        before = smaller(images)
        batches = [Batch(images, torch.zeros(200, dtype=torch.int64), torch.arange(200))]
        refit(
            RefitInputs(network, smaller, dependencies, {}, dropped=names),
            batches,
            RefitSection(),
            seed=0,
        )
        return network(images), before, smaller(images)


@pytest.mark.parametrize("names", [["blocks.1"], ["blocks.1", "blocks.2"], ["blocks.0"]])
def test_the_refit_recovers_most_of_a_branch(names: list[str]) -> None:
    expected, before, after = outputs_and_refit(names)
    variance = expected.var(0).mean()
    assert (after - expected).square().mean() < 0.3 * (before - expected).square().mean()
    assert (after - expected).square().mean() < 0.3 * variance


@pytest.mark.parametrize("block", [BasicBlock(8, 8), Scaled()])
def test_the_constant_makes_the_mean_right(block: nn.Module) -> None:
    network = seeded(Sequence(nn.Identity(), block))
    # Nothing before the branch can be estimated, so that the constant alone is left.
    network.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Softplus())  # type: ignore[assignment]
    dependencies, branches = branches_of(network)
    plan = plan_without("blocks.1")
    smaller = secateur.apply_plan(network, dependencies, plan)
    images = random_images(64, 8)
    batches = [Batch(images, torch.zeros(64, dtype=torch.int64), torch.arange(64))]
    inputs = RefitInputs(network, smaller, dependencies, {}, dropped=plan.dropped)
    refit(inputs, batches, RefitSection(), seed=0)
    branch = branches["blocks.1"]

    def value(model: nn.Module, dropped: list[ResidualBranch]) -> Tensor:
        interpreter = GraphInterpreter(
            dependencies.graph, tensors_of(model), images, dropped=dropped
        )
        return interpreter.step(branch.sum)

    with torch.no_grad():
        whole, cut = value(network, []), value(smaller, [branch])
    if isinstance(block, BasicBlock):
        whole, cut = whole.relu(), cut  # only a ReLU reads the sum
    assert torch.allclose(cut.mean((0, 2, 3)), whole.mean((0, 2, 3)), atol=1e-4)
    assert smaller.get_parameter(branch.constant).abs().min() > 0


def test_sensitivity_is_what_the_refit_leaves() -> None:
    network = seeded(Sequence(*(BasicBlock(8, 8) for _ in range(3))))
    network.blocks[1].get_parameter("bn2.weight").data.zero_()
    network.blocks[1].get_parameter("bn2.bias").data.zero_()
    dependencies, branches = branches_of(network)
    images = random_images(90, 8)
    batches = [Batch(images, torch.zeros(90, dtype=torch.int64), torch.arange(90))]
    errors = measure_depth_sensitivity(network, dependencies, branches, batches)
    assert list(errors) == ["blocks.0", "blocks.1", "blocks.2"]
    assert errors["blocks.1"] < 0.01 * min(errors["blocks.0"], errors["blocks.2"])
    assert measure_depth_sensitivity(network, dependencies, {}, batches) == {}


def test_a_dropped_branch_pays_for_no_channels_and_costs_what_they_did_not() -> None:
    def macs(counts: dict[str, int]) -> float:
        inner = 10.0 * counts["inner"] if counts[f"{BRANCH_OF}block"] else 0.0
        return inner + 10 * counts["outer"]

    space = SearchSpace(
        {f"{BRANCH_OF}block": [0, 1], "inner": [*range(1, 11)], "outer": [*range(1, 11)]},
        macs,
        110,
        inside={f"{BRANCH_OF}block": ("inner",)},
    )
    channels = [0.0] + [n**2.0 for n in range(1, 11)]
    counts = lowest_sensitivity(
        space, {f"{BRANCH_OF}block": [0.0, 30.0], "inner": channels, "outer": channels}
    )
    # Two channels each cost 4 and save 20. To drop the branch costs 30, less those 4, and saves 80.
    # That is more than needed, so the channels come back.
    assert counts == {f"{BRANCH_OF}block": 0, "inner": 10, "outer": 10}
    dear = lowest_sensitivity(
        space, {f"{BRANCH_OF}block": [0.0, 300.0], "inner": channels, "outer": channels}
    )
    assert dear[f"{BRANCH_OF}block"] == 1
    assert sorted([dear["inner"], dear["outer"]]) == [5, 6]


def test_a_plan_with_dropped_branches_is_kept_as_text() -> None:
    plan = plan_without("b", "c", removed={"a": (1,)})
    text = plan.to_json()
    assert '"schema_version": 4' in text
    assert PruningPlan.from_json(text) == plan
    with pytest.raises(RunFolderError, match="does not match its content"):
        PruningPlan.from_json(text.replace('"c"', '"d"'))
    with_ranks = PruningPlan({"a": (1,)}, Budget("macs", 0.5), "vote", ranks={"b": 3})
    assert '"schema_version": 3' in with_ranks.to_json()


def test_a_branch_that_the_network_lacks_is_refused() -> None:
    network = make_network("chain")
    dependencies = build_dependency_graph(network, random_images(2, 8))
    with pytest.raises(RunFolderError, match="drops 'conv1', which is not a residual branch"):
        secateur.apply_plan(network, dependencies, plan_without("conv1"))


@pytest.mark.parametrize(
    ("actions", "target"),
    [
        (["depth"], 0.6),
        (["depth"], "params=0.6"),
        (["channels", "depth"], "params=0.6"),
        ("channels,rank,depth", 0.6),
    ],
)
def test_pruning_by_depth_meets_the_budget_and_is_loaded_again(
    actions: Any, target: float | str, tmp_path: Path
) -> None:
    network, images = resnet(), random_images(60, 8)
    for name in ("layer2.1", "layer3.1"):  # cheap to drop
        network.get_parameter(f"{name}.bn2.weight").data.mul_(0.01)
    result = secateur.prune(network, images, target=target, settings={"plan.actions": actions})
    before, after = result.scores["before"], result.scores["refit"]
    assert min(after.macs / before.macs, after.parameters / before.parameters) <= 0.6
    assert after.macs == macs_of(result.model)
    assert after.parameters == params_of(result.model)
    assert result.plan.dropped or "channels" in actions or "rank" in actions
    assert result.result.equivalence_error < 1e-4
    assert tuple(dropped.name for dropped in result.result.dropped) == result.plan.dropped
    inside = (*result.plan.removed, *result.plan.ranks)
    assert not any(name.startswith(f"{block}.") for name in inside for block in result.plan.dropped)
    if actions == ["depth"]:
        assert not result.plan.removed
        assert not result.plan.ranks
    with torch.no_grad():
        expected = result.model(images)
    result.save(tmp_path / "run")
    loaded = secateur.load(tmp_path / "run", architecture=network)
    program = secateur.load_program(tmp_path / "run")
    assert torch.equal(loaded(images), expected)
    assert torch.allclose(program(images), expected, atol=1e-5)
    report = tmp_path / "run" / "report.html"
    if isinstance(actions, str):  # with a gallery
        report = result.report(tmp_path / "report.html")
    page = report.read_text()
    for name in result.plan.dropped:
        count = len(result.plan.dropped)
        assert f"{count} residual branch{'es' * (count > 1)} dropped" in str(result)
        assert "Residual branches dropped" in page
        assert f'<th scope="row">{name}</th>' in page


def test_each_part_of_the_network_gets_what_costs_least() -> None:
    network = resnet()
    dependencies, branches = branches_of(network)
    layers = factorable_layers(network, dependencies)
    errors = {"layer1.0": 9.0, "layer1.1": 1e-6, "layer2.1": 9.0, "layer3.1": 1e-6}
    actions = Actions(
        RankChoice(
            layers, {name: [1.0] * (layer.whole_rank + 1) for name, layer in layers.items()}
        ),
        BranchChoice(branches, errors),
    )
    sizes = {name: len(group) for name, group in dependencies.groups.items()}
    plan = make_plan(
        {name: torch.arange(float(size)) for name, size in sizes.items()},
        dependencies,
        Budget("macs", 0.7),
        "mine",
        allocation=Allocation(
            "sensitivity",
            {name: [1e-3 * n for n in range(size + 1)] for name, size in sizes.items()},
            actions,
        ),
    )
    assert plan.dropped == ("layer1.1", "layer3.1")
    assert plan.removed.keys() <= {
        "layer1.0.conv1",
        "layer2.0.conv1",
        "layer2.1.conv1",
        "layer3.0.conv1",
    }
    assert plan.ranks == {}
    smaller = secateur.apply_plan(network, dependencies, plan)
    assert 0.64 < macs_of(smaller) / macs_of(network) <= 0.7


def table_of(dependencies: DependencyGraph) -> LatencyTable:
    """A table in which a layer takes a millisecond for each million of MACs, whatever its width."""
    whole = dependencies.count_after({})
    return LatencyTable(
        hardware=Hardware(
            processor="none",
            threads=1,
            device="cpu",
            dtype="float32",
            engine="pytorch",
            version="2",
        ),
        batch=1,
        block=1,
        layers=tuple(
            LayerTimes(
                layer=layer.name,
                read=(layer.shape[1],),
                produced=(layer.shape[0],),
                ms=((1e-6 * layer.macs(whole),),),
            )
            for layer in dependencies.layers
        ),
        layers_factor=2.0,
        fixed_ms=0.5,
        ms_per_value=0.0,
    )


def test_a_target_of_latency_drops_branches() -> None:
    network = resnet()
    dependencies, branches = branches_of(network)
    table = table_of(dependencies)
    (saved,) = dropped_savings(dependencies, [branches["layer1.1"]], "latency", table)({})
    assert saved == pytest.approx(2.0 * 1e-6 * 2 * 9 * 16 * 16 * 64)
    per_value = table.model_copy(update={"layers_factor": 0.0, "ms_per_value": 1.0})
    (saved,) = dropped_savings(dependencies, [branches["layer1.1"]], "latency", per_value)({})
    assert saved == 2 * 16 * 64  # a norm and a ReLU; the constant is written in place of the other
    errors = {"layer1.0": 9.0, "layer1.1": 1e-3, "layer2.1": 9.0, "layer3.1": 2e-3}
    sizes = {name: len(group) for name, group in dependencies.groups.items()}
    plan = make_plan(
        {name: torch.ones(size) for name, size in sizes.items()},
        dependencies,
        Budget("latency", 0.75),
        "mine",
        allocation=Allocation(
            "sensitivity",
            {name: [0.0] * (size + 1) for name, size in sizes.items()},
            Actions(branches=BranchChoice(branches, errors)),
        ),
        latency=table,
    )
    # Channels save no time here.
    assert plan.dropped == ("layer1.1", "layer3.1")
    assert plan.budget == Budget("latency", 0.75)


def test_channels_of_a_whole_stage_and_a_branch_of_it_go_together() -> None:
    network, images = resnet(), random_images(40, 8)
    dependencies = build_dependency_graph(network, random_images(2, 8), prune_residual=True)
    plan = plan_without("layer1.1", removed={"conv1": (1, 4, 5)})
    smaller = secateur.apply_plan(network, dependencies, plan)
    assert smaller.get_parameter("layer1.1.bn2.value").shape == (13,)
    smaller.get_parameter("layer1.1.bn2.value").data.normal_()
    assert check_equivalence(network, dependencies, plan, smaller, images[:3]) < 1e-5
    settings = {"plan.actions": ["channels", "depth"], "plan.prune_residual": True}
    result = secateur.prune(network, images, target=0.4, settings=settings)
    assert result.scores["refit"].macs <= 0.4 * result.scores["before"].macs


def test_a_network_in_bfloat16_comes_back_as_such() -> None:
    network = resnet().bfloat16()
    result = secateur.prune(network, random_images(40, 8), target=0.6, settings=DEPTH)
    assert result.plan.dropped
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_sums_before_a_dropped_branch_are_no_targets_of_distillation() -> None:
    network = resnet()
    dependencies, branches = branches_of(network)
    sums = residual_sums(dependencies, {}, [branches["layer2.1"]])
    modules = [total.module for total in sums]
    assert "layer2.0" not in modules
    assert {"layer1.1", "layer2.1", "layer3.0"} <= set(modules)


class Inner(nn.Module):
    """A sum of two convolutions, deep inside of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.one(x) + self.other(x)
        return total


class Outer(nn.Module):
    """A block whose branch, a module, holds a module with a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(Inner(), nn.ReLU()), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.body(x)
        return total.relu()


def test_sums_inside_a_dropped_branch_are_no_targets_of_distillation() -> None:
    network = seeded(Sequence(Outer(), Outer()))
    dependencies, branches = branches_of(network)
    modules = [total.module for total in residual_sums(dependencies, {}, [branches["blocks.1"]])]
    assert modules == ["blocks.0.body.0.0", "blocks.1"]
    settings = {"plan.actions": ["depth"], "distill.epochs": 1}
    result = secateur.prune(network, random_images(30, 8), target=0.6, settings=settings)
    assert len(result.plan.dropped) == 1
    assert "distilled" in result.scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actions": ["depth"], "target": "memory=0.5"}, "depth does not plan by memory"),
        ({"actions": ["depth"], "target": "filters=0.5"}, "depth does not plan by filters"),
        ({"actions": ["depth"], "allocation": "global"}, "needs allocation = 'sensitivity'"),
        ({"actions": ["depth"], "rounds": 2}, "the action depth needs rounds = 1"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PlanSection(**settings)


def test_savings_are_of_macs_parameters_and_time() -> None:
    dependencies, branches = branches_of(resnet())
    with pytest.raises(UsageError, match="plans by macs, params or latency, not by memory"):
        dropped_savings(dependencies, [*branches.values()], "memory")
    removed = {"layer1.1.conv1": (0, 1, 2, 3)}
    whole = dropped_savings(dependencies, [branches["layer1.1"]], "macs")
    assert whole(removed)[0] == 0.75 * whole({})[0] == 0.75 * 2 * 9 * 16 * 16 * 64
    params = dropped_savings(dependencies, [branches["layer1.1"]], "params")
    assert params({})[0] == 2 * 9 * 16 * 16 + 4 * 16 - 16


def test_the_cut_network_without_a_branch_is_what_the_graph_gives() -> None:
    network = resnet()
    dependencies, branches = branches_of(network)
    smaller = secateur.apply_plan(network, dependencies, plan_without(*branches))
    state = {**tensors_of(network), **tensors_of(smaller)}
    images = random_images(3, 8)
    interpreter = GraphInterpreter(dependencies.graph, state, images, dropped=[*branches.values()])
    with torch.no_grad():
        assert relative_error(smaller(images), interpreter.finish()[0]) < 1e-5
