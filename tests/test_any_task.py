"""Networks that are no classifiers: maps, pictures, several outputs, numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur import OutputPart
from secateur.api import PruneResult
from secateur.runtime.errors import DataError, SecateurError, TraceError, UsageError

COUNT = 40
FAST = {"report.images": 0, "score.sample_every": 2}


def body() -> list[nn.Module]:
    """Two convolutions, of which the first may lose channels."""
    return [
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.ReLU(),
    ]


class SeveralOutputs(nn.Module):
    """Returns what `container` makes of two maps."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body())
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 3, stride=2)
        self._container = container

    def forward(self, images: Tensor) -> Any:
        features = self.body(images)
        return self._container(self.boxes(features), self.scores(features))


class Output(OrderedDict[str, Tensor]):
    """Stands for the `ModelOutput` of transformers: a mapping with attributes."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits)
        self.logits = logits


def map_network() -> nn.Module:
    """A network that returns maps in which several classes win."""
    model = nn.Sequential(*body(), nn.Conv2d(8, 4, 1))
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.5)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(COUNT, 3, 10, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def prune(model: nn.Module, images: Any, **options: Any) -> PruneResult:
    settings = {**FAST, **options.pop("settings", {})}
    return secateur.prune(model.eval(), images, **{"target": 0.6, **options}, settings=settings)


def test_a_map_of_class_scores_is_a_segmentation(images: Tensor) -> None:
    model = map_network()
    masks = model(images).argmax(1)
    masks[:, 0] = 255
    result = prune(model, (images, masks))
    assert (result.result.task.kind, result.result.task.metric_name) == ("segmentation", "mIoU")
    before, cut, refit = (result.scores[stage] for stage in ("before", "cut", "refit"))
    assert before.metric == 1
    assert cut.metric < refit.metric < 1
    assert refit.agreement_fraction == pytest.approx(refit.details["pixel accuracy"], abs=0.02)
    assert result.model(images[:2]).shape == (2, 4, 10, 12)
    assert "255 in masks is ignored." in result.result.notes


def test_without_masks_a_segmentation_is_compared_with_the_original(images: Tensor) -> None:
    result = prune(map_network(), images)
    assert not result.result.task.has_labels
    assert result.result.task.metric_name == "mIoU to original"
    assert result.scores["before"].metric == 1
    assert 0 < result.scores["refit"].metric <= 1


def test_a_picture_is_compared_by_its_squared_error(images: Tensor) -> None:
    model = nn.Sequential(*body(), nn.Conv2d(8, 3, 1))
    result = prune(model, images)
    assert result.result.task.kind == "regression"
    with torch.inference_mode():
        test = images[4::5]
        wanted, output = model(test), result.model(test)
    r2 = 1 - float((output - wanted).square().mean() / wanted.var(correction=0))
    assert result.scores["refit"].agreement_fraction == pytest.approx(r2, abs=0.02)
    assert result.scores["refit"].metric == result.scores["refit"].agreement_fraction
    assert "R² to original" in repr(result)


def test_targets_are_scored_by_r2(images: Tensor) -> None:
    model = nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with torch.inference_mode():
        wanted = model.eval()(images)
    wanted = wanted + 0.3 * wanted.std(0) * torch.randn(wanted.shape)
    result = prune(model, (images, wanted), task="regression")
    assert result.result.task.metric_name == "R²"
    test = wanted[4::5]
    with torch.inference_mode():
        error = (model(images[4::5]) - test).square().sum()
    expected = 1 - float(error / (test - test.mean(0)).square().sum())
    assert result.scores["before"].metric == pytest.approx(expected, abs=1e-4)
    assert secateur.evaluate(
        model, [(images[4::5], test)], task="regression"
    ).metric == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "container",
    [
        lambda boxes, scores: (boxes, scores),
        lambda boxes, scores: {"boxes": boxes, "scores": [scores]},
        lambda boxes, scores: {"boxes": boxes, "count": 3, "of": None, "scores": scores},
    ],
)
def test_outputs_of_any_structure_are_compared(
    images: Tensor, container: Callable[[Tensor, Tensor], Any]
) -> None:
    model = SeveralOutputs(container)
    result = prune(model, images)
    assert [part.leaf for part in result.result.task.parts] == [0, 1]
    assert type(result.model(images)) is type(model(images))
    assert result.result.equivalence_error < 1e-4
    refit, cut = result.scores["refit"], result.scores["cut"]
    assert refit.agreement_fraction is not None
    assert cut.agreement_fraction is not None
    assert refit.agreement_fraction > cut.agreement_fraction


def test_what_is_compared_can_be_chosen(images: Tensor) -> None:
    model = SeveralOutputs(lambda boxes, scores: (boxes, scores))
    parts = (OutputPart(1, transform="softmax"), OutputPart(0, start=1, stop=3))
    result = prune(model, images, outputs=parts)
    chosen = result.result.task.parts
    assert [(part.leaf, part.start, part.transform) for part in chosen] == [
        (1, 0, "softmax"),
        (0, 1, "values"),
    ]
    with pytest.raises(UsageError, match="outputs name the tensor 7"):
        prune(model, images, outputs=(OutputPart(7),))
    with pytest.raises(UsageError, match="must be a list of OutputPart"):
        prune(model, images, outputs=[{"stop": 3}])


def test_class_numbers_are_no_labels_of_values(images: Tensor) -> None:
    labels = torch.zeros(len(images)).long()
    with pytest.raises(DataError, match=r"don't fit the outputs, .*: give labels of that form"):
        prune(map_network(), (images, labels), outputs=[OutputPart()])
    with pytest.raises(UsageError, match="not in segmentation"):
        prune(map_network(), images, task="segmentation", outputs=[OutputPart()])


def test_logits_of_a_model_output_are_taken(images: Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = map_network()

        def forward(self, pixel_values: Tensor) -> Output:
            return Output(self.net(pixel_values))

    result = prune(Named(), {"pixel_values": images})
    assert result.result.task.kind == "segmentation"
    assert isinstance(result.model(images), Output)


def test_a_metric_of_the_users_scores_networks_and_sizes(images: Tensor) -> None:
    model = nn.Sequential(*body(), nn.Conv2d(8, 3, 1)).eval()
    with torch.inference_mode():
        wanted = model(images)

    def closeness(network: nn.Module) -> float:
        return -float((network(images) - wanted).square().mean() / wanted.var())

    result = prune(
        model, images, metric=closeness, settings={"plan.max_drop": 0.5, "plan.target": "macs=0.5"}
    )
    assert result.result.task.metric_name == "closeness"
    assert result.scores["before"].metric == 0
    assert result.result.size_trials[0].validation_metric == 0
    assert all(t.validation_metric >= -0.5 for t in result.result.size_trials if t.kept)
    with pytest.raises(SecateurError, match="must return a finite number"):
        prune(model, images, metric=lambda network: float("nan"))
    with pytest.raises(UsageError, match="must be a name or a function"):
        prune(model, images, metric=3)


def test_fine_tuning_follows_the_original(images: Tensor) -> None:
    result = prune(map_network(), images, epochs=1)
    finetuning = result.result.finetuning
    assert finetuning is not None
    assert finetuning.before_metric <= 1
    assert result.scores["finetuned"].metric > 0


class HoldsTheBatch(nn.Module):
    """Makes a constant of a number of Python's for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = map_network()

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.net(images)
        return maps + torch.tensor([0.0] * len(images)).reshape(-1, 1, 1, 1)


def test_a_network_for_one_number_of_images_is_refused_with_its_place(images: Tensor) -> None:
    message = r"one number of images alone.*add.* at \S*test_any_task.py:\d+"
    with pytest.raises(TraceError, match=message):
        prune(HoldsTheBatch(), images)


class Phases(nn.Module):
    """Returns a row of numbers for each of two phases."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*body(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return self.first(features), self.second(features)


def test_all_rows_of_a_tuple_count_where_they_are_values(images: Tensor) -> None:
    result = prune(Phases(), images, task="regression")
    assert [part.leaf for part in result.result.task.parts] == [0, 1]
    assert not any("lose channels" in note for note in result.result.notes)
    (first, second), wanted = result.model(images[:2]), (2, 5)
    assert first.shape == second.shape == wanted
    assert [part.leaf for part in prune(Phases(), images).result.task.parts] == []  # logits
