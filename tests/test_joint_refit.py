from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import CLASSES, make_network, random_images, randomise_norms
from other_inputs import Clips
from secateur.config import Budget, RefitSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.interpreter import GraphInterpreter
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.module_state import tensors_of
from secateur.pruning.apply import apply_plan
from secateur.pruning.outcome import LayerRefit
from secateur.pruning.plan import PruningPlan
from secateur.pruning.refit import joint
from secateur.pruning.refit.gauss_newton import SegmentProblem
from secateur.pruning.refit.kernel_uses import uses_by_kernel
from secateur.pruning.refit.layers import RefitLayer
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.pruning.refit.rows import in_patch_order
from secateur.pruning.refit.segment_function import Seen, SegmentFunction
from secateur.pruning.refit.segments import find_segments

JOINT, LAYERWISE = RefitSection(positions=10_000), RefitSection(positions=10_000, joint=False)


def in_batches(images: Tensor, size: int = 50) -> list[Batch]:
    numbers = torch.arange(len(images)).split(size)
    parts = zip(images.split(size), numbers, strict=True)
    return [Batch(part, torch.zeros(len(part)).long(), indices) for part, indices in parts]


CALIBRATION = in_batches(random_images(400, seed=3))


def cut_and_refit(
    model: nn.Module, removed: Mapping[str, tuple[int, ...]], settings: RefitSection
) -> tuple[nn.Module, tuple[LayerRefit, ...]]:
    dependencies = build_dependency_graph(model, random_images(1, seed=0))
    plan = PruningPlan(removed, Budget("macs", 0.5), "test")
    smaller = apply_plan(model, dependencies, plan)
    inputs = RefitInputs(model, smaller, dependencies, removed)
    return smaller, refit(inputs, CALIBRATION, settings, seed=0)


class Block(nn.Module):
    """A residual block: what `second` puts out goes into a sum that a ReLU reads."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 4, 3, padding=1)
        self.linear = nn.Linear(4, CLASSES)

    def block(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.block(images).mean((2, 3)))
        return logits


def block() -> Block:
    torch.manual_seed(0)
    model = Block()
    randomise_norms(model, torch.Generator().manual_seed(1))
    return model.eval()


def error_of(model: Block, smaller: nn.Module) -> float:
    assert isinstance(smaller, Block)
    images = random_images(200, seed=99)
    with torch.no_grad():
        return float((smaller.block(images) - model.block(images)).square().mean())


def test_the_readers_error_on_new_images_falls() -> None:
    model, removed = block(), {"first": (0, 2, 3, 5, 7)}
    alone, results = cut_and_refit(model, removed, LAYERWISE)
    assert [result.joint for result in results] == [None, None]
    together, results = cut_and_refit(model, removed, JOINT)
    gain = results[0].joint
    assert results[0].layer == "second"
    assert gain is not None
    assert gain.group == "first"
    assert gain.error_after < gain.error_before
    assert results[1].joint is None
    assert error_of(model, together) < error_of(model, alone)
    # The kernel that produces the group has changed, and so has the offset behind it.
    for name in ("first.weight", "norm.running_mean", "second.weight", "second.bias"):
        assert not torch.equal(together.state_dict()[name], alone.state_dict()[name]), name
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.running_var"):
        assert torch.equal(together.state_dict()[name], alone.state_dict()[name]), name


class TwoConsumers(Block):
    """Two convolutions read the group, and their outputs are added, as in RepVGG."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(8, 4, 1)

    def block(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.first(F.relu(self.stem(images)))))
        return F.relu(self.second(hidden) + self.third(hidden))


def test_consumers_that_go_into_one_sum_are_estimated_together() -> None:
    torch.manual_seed(0)
    model, removed = TwoConsumers(), {"first": (0, 2, 3, 5, 7)}
    randomise_norms(model, torch.Generator().manual_seed(1))
    alone, _ = cut_and_refit(model.eval(), removed, LAYERWISE)
    together, results = cut_and_refit(model, removed, JOINT)
    assert any(result.joint is not None for result in results)
    assert error_of(model, together) < error_of(model, alone)


def test_where_nothing_is_missing_nothing_changes() -> None:
    """The removed channels are copies of others: the error is zero before."""
    model, removed = block(), {"first": (4, 5, 6, 7)}
    with torch.no_grad():
        for tensor in (model.first.weight, *model.norm.state_dict().values()):
            if tensor.dim():
                tensor[4:] = tensor[:4].clone()
    together, results = cut_and_refit(model, removed, JOINT)
    assert results[0].joint is not None
    assert results[0].joint.error_after <= results[0].joint.error_before < 1e-8
    assert error_of(model, together) < 1e-8


def test_groups_that_lost_little_are_left_as_they_are() -> None:
    model = block()
    little, results = cut_and_refit(model, {"first": (3,)}, JOINT)
    alone, _ = cut_and_refit(model, {"first": (3,)}, LAYERWISE)
    assert all(result.joint is None for result in results)
    for name, tensor in little.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


def test_costly_parts_are_estimated_from_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels take MACs at every position; images come in batches of 64."""
    model, removed, image_counts = block(), {"first": (0, 2, 3, 5, 7)}, []

    class Spy(SegmentProblem):
        def __post_init__(self) -> None:
            image_counts.append(self.images)
            super().__post_init__()

    monkeypatch.setattr(joint, "SegmentProblem", Spy)
    dependencies = build_dependency_graph(model, random_images(1, seed=0))
    count = dependencies.count_after(removed)
    macs = sum(
        layer.macs(count) for layer in dependencies.layers if layer.name in ("first", "second")
    )
    for enough_for in (1000, 200, 1):
        monkeypatch.setattr(joint, "MACS", enough_for * macs)
        cut_and_refit(model, removed, JOINT)
    assert image_counts == [256, 192, 64]


def test_two_linear_layers_come_close_to_the_best_of_their_rank() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 5)).eval()
    images = torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    dependencies = build_dependency_graph(model, images[:1])
    removed = {"1": (0, 1, 4)}
    errors = {}
    for settings in (JOINT, LAYERWISE):
        smaller = apply_plan(model, dependencies, PruningPlan(removed, Budget("macs", 0.5), "test"))
        refit(
            RefitInputs(model, smaller, dependencies, removed), in_batches(images), settings, seed=0
        )
        with torch.no_grad():
            wanted, got = (net(images).double() for net in (model, smaller))
        errors[settings.joint] = float((wanted - got).square().sum())
    # No three hidden units do better than the three largest singular values.
    best = float(torch.linalg.svdvals(wanted - wanted.mean(0))[3:].square().sum())
    assert best <= errors[True] < 0.8 * errors[False]


def test_rows_that_produce_other_channels_stay() -> None:
    """Half of a layer's outputs are a group, the other half goes to another reader."""
    model = make_network("chain")
    dependencies = build_dependency_graph(model, random_images(1, seed=0))
    group = next(iter(dependencies.groups))
    width = len(dependencies.groups[group])
    smaller, results = cut_and_refit(model, {group: tuple(range(width // 2))}, JOINT)
    assert any(result.joint is not None for result in results)
    with torch.no_grad():
        assert torch.isfinite(smaller(random_images(3, seed=5))).all()


def test_frames_of_a_clip_are_held_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Clips().eval()
    clips = random_images(80, seed=3).unflatten(0, (-1, 2))
    frames: list[list[int]] = []
    patches = RefitLayer.patches

    def recorded(self: RefitLayer, inputs: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        if len(rows) == 64:
            frames.append(rows.tolist())
        return patches(self, inputs, positions, rows)

    monkeypatch.setattr(RefitLayer, "patches", recorded)
    dependencies = build_dependency_graph(model, clips[:3])
    removed = {"body.2": tuple(range(0, 16, 2))}
    plan = PruningPlan(removed, Budget("macs", 0.5), "test")
    smaller = apply_plan(model, dependencies, plan)
    inputs = RefitInputs(model, smaller, dependencies, removed)
    results = refit(inputs, in_batches(clips), JOINT, seed=0)
    assert results[0].joint is not None
    assert frames == [[frame for frame in range(80) if frame // 2 % 5 != 4]]


def test_changes_are_the_derivative_behind_a_folded_norm() -> None:
    model, removed = block().double(), {"first": (0, 2, 3, 5, 7)}
    images = random_images(4, seed=3).double()
    dependencies = build_dependency_graph(model, images[:1])
    smaller = apply_plan(model, dependencies, PruningPlan(removed, Budget("macs", 0.5), "test"))
    kept, state = KeptChannels(dependencies, removed), tensors_of(smaller)
    uses = uses_by_kernel(dependencies)
    (segment,) = find_segments(kept, removed, uses, rectified=False)
    function = SegmentFunction(segment, kept, state)
    start = GraphInterpreter(dependencies.graph, state, images, kept.sizes)
    start.advance(segment.first)
    kernels = [in_patch_order(state[name]) for name in segment.weights]
    point = [(kernel, kernel.new_zeros(kernel.shape[:2])) for kernel in kernels]
    seen: Seen = {}
    with torch.no_grad():
        (sums,) = function(start, point, seen)
        torch.testing.assert_close(sums.relu(), smaller.block(images))  # type: ignore[operator]
        generator = torch.Generator().manual_seed(0)
        direction = [
            (torch.randn(k.shape, generator=generator).double(), torch.ones_like(o))
            for k, o in point
        ]
        (change,) = function.changes(start, seen, direction)
        ends = [
            [
                (k + step * change_k, o + step * change_o)
                for (k, o), (change_k, change_o) in zip(point, direction, strict=True)
            ]
            for step in (1e-6, -1e-6)
        ]
        (ahead,), (behind,) = (function(start, end) for end in ends)
    torch.testing.assert_close(change, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["chain", "residual", "concat", "depthwise", "flattened"])
def test_no_group_gets_worse(name: str) -> None:
    model = make_network(name)
    dependencies = build_dependency_graph(model, random_images(1, seed=0))
    removed = {name: tuple(range(len(g) // 2)) for name, g in dependencies.groups.items()}
    smaller, results = cut_and_refit(model, removed, JOINT)
    gains = [result.joint for result in results if result.joint is not None]
    assert gains
    assert all(gain.error_after <= gain.error_before for gain in gains)
    for tensor in smaller.state_dict().values():
        assert torch.isfinite(tensor).all()
