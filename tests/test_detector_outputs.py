"""Where a detector sees objects counts: in what is compared of outputs, and in the refit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.config import RefitSection
from secateur.data import Batch
from secateur.graph.build import build_dependency_graph
from secateur.graph.cut import cut
from secateur.graph.kept_channels import KeptChannels
from secateur.graph.module_state import tensors_of
from secateur.graph.output_values import OutputPart, measured
from secateur.models.divergence import output_error
from secateur.models.examine import Outputs, make_task
from secateur.models.task import Task
from secateur.pruning.refit.important_positions import PositionImportance
from secateur.pruning.refit.layers import refit_layer
from secateur.pruning.refit.layerwise import RefitInputs, refit
from secateur.runtime.errors import UsageError

PARTS = (
    OutputPart(stop=4, times=4),
    OutputPart(start=4, stop=5, transform="probabilities"),
    OutputPart(start=5, transform="probabilities", times=4),
)


def test_angles_of_probabilities_measure_their_divergence() -> None:
    p, q = torch.tensor([[0.3, 0.6, 0.02]]), torch.tensor([[0.33, 0.57, 0.025]])
    part = OutputPart(transform="probabilities")
    half = (part.read([p]) - part.read([q])).square().sum() / 2
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert float(half) == pytest.approx(float(divergence), rel=0.05)


@pytest.mark.parametrize("p", [0.0, 1e-30, 0.5, 1.0])
def test_angles_have_a_finite_gradient_everywhere(p: float) -> None:
    leaf = torch.full((2, 5, 3), p, requires_grad=True)
    for part in (PARTS[1], OutputPart(stop=4, times=4)):
        (gradient,) = torch.autograd.grad(part.read([leaf]).sum(), leaf)
        assert gradient.isfinite().all()


def test_a_sample_of_the_values_stands_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = OutputPart().read([leaf])
    monkeypatch.setattr("secateur.graph.output_values.MOST_VALUES", 2048)
    sample = OutputPart().read([leaf])
    assert sample.shape[1] <= 2048 < whole.shape[1]
    assert float(sample.square().sum()) == pytest.approx(float(whole.square().sum()), rel=0.1)


def test_all_parts_together_have_a_variance_of_one() -> None:
    leaf = torch.rand(4, 9, 30, generator=torch.Generator().manual_seed(0))
    parts = measured(PARTS, [leaf])
    values = torch.cat([part.read([leaf]) for part in parts], dim=1)
    within = torch.cat([part.read([leaf]).double().var(correction=0)[None] for part in parts])
    sizes = torch.tensor([part.read([leaf]).shape[1] for part in parts])
    assert float((within * sizes).sum() / sizes.sum()) == pytest.approx(1)
    assert values.shape == (4, 9 * 30)


def detections(*, objectness: float, shift: float = 0.0, score: float = 0.8) -> Tensor:
    """One image with one position, `[1, 4 + 1 + 2, 1]`."""
    boxes = torch.tensor([1.0, 2.0, 3.0, 4.0]) + shift
    return torch.cat([boxes, torch.tensor([objectness, score, 0.1])])[None, :, None]


def error_of(first: Tensor, second: Tensor) -> float:
    return output_error([first], [second], Task("detection", parts=PARTS))


def test_boxes_count_as_often_as_there_is_an_object_and_linearly() -> None:
    def shifted(objectness: float, shift: float) -> float:
        original = detections(objectness=objectness)
        return error_of(original, detections(objectness=objectness, shift=shift))

    assert shifted(0.5, 0.0) == 0
    assert shifted(0.5, 0.2) == pytest.approx(2 * shifted(0.5, 0.1), rel=1e-3)
    assert shifted(0.8, 0.1) == pytest.approx(2 * shifted(0.4, 0.1), rel=1e-3)
    # RMS error of four coordinates, summed: 2 · 0.1, over their deviation of √1.25, times 0.5.
    assert shifted(0.5, 0.1) == pytest.approx(0.5 * 0.2 / math.sqrt(1.25), rel=1e-3)


def test_values_that_count_everywhere_are_relative_to_their_deviation() -> None:
    parts = (OutputPart(stop=4), *PARTS[1:])
    for unit in (1.0, 1000.0):
        original, other = detections(objectness=0.5), detections(objectness=0.5, shift=0.1)
        original[:, :4], other[:, :4] = unit * original[:, :4], unit * other[:, :4]
        error = output_error([original], [other], Task("detection", parts=parts))
        assert error == pytest.approx(4 * 0.1**2 / 1.25 / 2, rel=1e-3)


def test_a_large_seed_draws_positions() -> None:
    model, images = SpotDetector().eval(), spot_images(2)
    importance = replace(importance_of(model, images, most=4), seed=2**63 - 1)
    assert importance.positions(images, torch.arange(2))


def test_probabilities_count_by_their_divergence() -> None:
    original, other = detections(objectness=0.5), detections(objectness=0.5, score=0.75)
    divergence = 0.8 * math.log(0.8 / 0.75) + 0.2 * math.log(0.2 / 0.25)
    assert error_of(original, other) == pytest.approx(0.5 * divergence, rel=0.05)
    fainter = detections(objectness=0.45)
    divergence = 0.5 * math.log(0.5 / 0.45) + 0.5 * math.log(0.5 / 0.55)
    assert error_of(original, fainter) == pytest.approx(divergence, rel=0.05)


class SpotDetector(nn.Module):
    """Returns `[image, 4 + 1 + 2, height, width]`; bright positions are objects."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 7, 1)

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.head(self.mix(self.features(images).relu()).relu())
        scores = values[:, 4:].sigmoid()
        objectness = scores[:, :1] * (images - 1).clamp(0, 1)
        return torch.cat([values[:, :4], objectness, scores[:, 1:]], dim=1)


def spot_images(count: int) -> Tensor:
    """Faint noise with one bright spot of 3 × 3 in each image, `[image, 1, 24, 24]`."""
    generator = torch.Generator().manual_seed(1)
    images = 0.3 * torch.rand(count, 1, 24, 24, generator=generator)
    for image, (row, column) in zip(
        images, torch.randint(2, 20, (count, 2), generator=generator), strict=True
    ):
        image[0, row : row + 3, column : column + 3] += 2
    return images


TASK = Task("detection", parts=PARTS)


def importance_of(model: nn.Module, images: Tensor, most: int) -> PositionImportance:
    graph = build_dependency_graph(model, images[:2])
    kept = KeptChannels(graph, {})
    layers = [refit_layer(layer, kept) for layer in graph.layers]
    return PositionImportance(graph.graph, tensors_of(model), layers, TASK, most, seed=0)


def test_positions_are_drawn_at_objects() -> None:
    model, images = SpotDetector().eval(), spot_images(20)
    importance = importance_of(model, images, most=32)
    positions = importance.positions(images, torch.arange(20))
    names = {layer.node: layer.layer.name for layer in importance.layers}
    assert {names[node] for node in positions} == {"features", "mix", "head"}
    for chosen in positions.values():
        assert chosen.shape == (20, 32)
        bright = images.flatten(1).gather(1, chosen) > 1
        near = nn.functional.max_pool2d(images, 5, 1, 2).flatten(1).gather(1, chosen) > 1
        assert float(near.float().mean()) > 0.8  # 49 of 576 positions are so near
        assert float(bright.float().mean()) > 0.3


def test_positions_depend_on_the_image_and_its_number_alone() -> None:
    model, images = SpotDetector().eval(), spot_images(10)
    importance = importance_of(model, images, most=16)
    numbers = torch.arange(10)
    whole = importance.positions(images, numbers)
    parts = [importance.positions(images[part], numbers[part]) for part in numbers.split(3)]
    for node, positions in whole.items():
        again = torch.cat([part[node] for part in parts])
        assert float((positions == again).float().mean()) > 0.99  # but for rounding
    other = importance.positions(images, numbers + 100)
    assert any(not torch.equal(other[node], positions) for node, positions in whole.items())


def test_a_refit_at_objects_keeps_detections_closer() -> None:
    model, images = SpotDetector().eval(), spot_images(60)
    graph = build_dependency_graph(model, images[:2])
    removed = {name: tuple(range(len(group) // 2)) for name, group in graph.groups.items()}
    batches = [Batch(images[:40], torch.zeros(40).long(), torch.arange(40))]
    errors = {}
    for sampling in ("even", "importance"):
        smaller = cut(model, graph, removed)
        settings = RefitSection.model_validate({"positions": 16, "sampling": sampling})
        refit(RefitInputs(model, smaller, graph, removed), batches, settings, seed=0, task=TASK)
        with torch.inference_mode():
            errors[sampling] = output_error([model(images[40:])], [smaller(images[40:])], TASK)
    assert errors["importance"] < 0.8 * errors["even"]


def test_classes_are_drawn_from_the_prediction() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    images = spot_images(6)
    graph = build_dependency_graph(model, images[:2])
    kept = KeptChannels(graph, {})
    layers = [refit_layer(layer, kept) for layer in graph.layers]
    importance = PositionImportance(graph.graph, tensors_of(model), layers, Task(), 8, seed=0)
    positions = importance.positions(images, torch.arange(6))
    sizes = {layer.layer.name: positions[layer.node] for layer in layers}
    assert sizes["0"].shape == (6, 8)
    assert sizes["4"].shape == (6, 1)
    assert not sizes["4"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"leaf": -1}, "count from 0"),
        ({"times": -1}, "count from 0"),
        ({"dim": 0}, "that of the images"),
        ({"start": 5, "stop": 3}, "holds nothing"),
        ({"transform": "logits"}, "must be one of values, probabilities, sigmoid, softmax"),
        ({"weight": -1.0}, "positive number"),
        ({"weight": math.nan}, "positive number"),
    ],
)
def test_a_part_that_no_output_has_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OutputPart(**arguments)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (OutputPart(stop=10), r"stop=10 in dimension 1 of tensor 0, .* \[4, 9, 30\]"),
        (OutputPart(start=9), "start=9"),
        (OutputPart(stop=4, times=9), "times=9"),
        (OutputPart(stop=4, times=8), "times=8 of the output, a weight, goes from -5 to -5"),
        (OutputPart(start=8, transform="probabilities"), "goes from -5 to -5: if these are logits"),
    ],
)
def test_a_part_must_fit_what_the_network_returns(part: OutputPart, message: str) -> None:
    leaf = torch.rand(4, 9, 30, generator=torch.Generator().manual_seed(0))
    leaf[:, 8] = -5
    with pytest.raises(UsageError, match=message):
        measured([part], [leaf])


def test_parts_without_any_object_are_left_out() -> None:
    leaf = torch.rand(4, 9, 30, generator=torch.Generator().manual_seed(0))
    leaf[:, 4] = 0
    outputs = Outputs("values", 9, "logits", (), [leaf])
    task = make_task(outputs, [], "detection", parts=(*PARTS, OutputPart(stop=4)))
    assert [(part.stop, part.times) for part in task.parts] == [(4, None)]
    assert task.notes == (
        "3 of the 4 parts of the outputs do not count: on the first images they are the same "
        "everywhere, or their objectness is 0.",
    )


class BehindThreshold(nn.Module):
    """Has a layer that no gradient of the images reaches, and one that none reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.is_hard = False

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.second((self.first(images) > 0).float())
        return (output > 0).float() if self.is_hard else output


@pytest.mark.parametrize("is_hard", [False, True])
def test_layers_without_gradient_get_even_positions(is_hard: bool) -> None:
    model = BehindThreshold().eval().requires_grad_(requires_grad=False)
    model.is_hard = is_hard
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = build_dependency_graph(model, images[:2])
    layers = [refit_layer(layer, KeptChannels(graph, {})) for layer in graph.layers]
    task = Task("regression", parts=(OutputPart(),))
    importance = PositionImportance(graph.graph, tensors_of(model), layers, task, 8, seed=0)
    positions = importance.positions(images, torch.arange(6))
    reached = [] if is_hard else ["second"]
    assert [layer.name for layer in graph.layers if layer.node in positions] == reached


def test_gradients_that_are_not_finite_count_for_nothing() -> None:
    class Root(nn.Module):
        """Has a root whose gradient at 0 is not a number, in the left half of each image."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, images: Tensor) -> Tensor:
            maps: Tensor = self.conv(images)
            return maps.square().sum(1, keepdim=True).sqrt()

    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[..., :4] = 0
    model = Root().eval()
    graph = build_dependency_graph(model, images)
    layers = [refit_layer(layer, KeptChannels(graph, {})) for layer in graph.layers]
    task = Task("regression", parts=(OutputPart(),))
    importance = PositionImportance(graph.graph, tensors_of(model), layers, task, 16, seed=0)
    (positions,) = importance.positions(images, torch.arange(2)).values()
    assert float((positions % 8 >= 4).double().mean()) > 0.8
