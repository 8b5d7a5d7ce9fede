from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from networks import make_network, random_images
from secateur.data import Batch
from secateur.graph.output_values import OutputPart
from secateur.models.evaluate import count_macs, evaluate, latency_ms
from secateur.models.task import Task, check_labels
from secateur.runtime.errors import DataError, UsageError
from secateur.runtime.timing import LATENCY_BATCH


class Table(nn.Module):
    """Returns the first row of its image: the logits are in the data."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return images[:, 0, 0, : self.classes]


def logits_as_images(logits: Tensor) -> Tensor:
    images = torch.zeros(len(logits), 3, 8, 8)
    images[:, 0, 0, : logits.shape[1]] = logits
    return images


def in_batches(images: Tensor, labels: Tensor, size: int) -> list[Batch]:
    parts = torch.arange(len(images)).split(size)
    return [Batch(images[part], labels[part], part) for part in parts]


def by_hand(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Top-1 and top-5 fractions and the mean cross-entropy, image by image."""
    top1, top5, loss = 0, 0, 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        better = sum(value > row[label] for value in row)
        top1 += better < 1
        top5 += better < 5
        loss += math.log(sum(math.exp(value) for value in row)) - row[label]
    return top1 / len(labels), top5 / len(labels), loss / len(labels)


@pytest.mark.parametrize("classes", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [4, 11, 100])
def test_accuracy_and_loss_are_those_of_each_image(
    classes: int, size: int, generator: torch.Generator
) -> None:
    logits = torch.randn(11, classes, generator=generator)
    labels = torch.randint(classes, (11,), generator=generator)
    score = evaluate(Table(classes), in_batches(logits_as_images(logits), labels, size))
    top1, top5, loss = by_hand(logits, labels)
    assert score.images == 11
    assert score.metric == pytest.approx(top1, abs=1e-12)
    assert score.top5_fraction == (pytest.approx(top5, abs=1e-12) if classes > 5 else None)
    assert score.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("classes", [3, 5])
def test_with_five_classes_or_fewer_there_is_no_top_five(classes: int) -> None:
    batches = in_batches(random_images(6), torch.tensor([0, 1, 2, 0, 1, 2]), 4)
    assert evaluate(Table(classes), batches).top5_fraction is None


def test_there_is_no_loss_where_nothing_is_compared(generator: torch.Generator) -> None:
    images = logits_as_images(torch.randn(6, 3, generator=generator))
    batches = in_batches(images, torch.zeros(6, dtype=torch.int64), 4)
    assert evaluate(Table(3), batches, task=Task()).loss is not None
    unlabelled, boxes = Task(has_labels=False), Task("detection", parts=(OutputPart(),))
    assert evaluate(Table(3), batches, task=unlabelled).loss is None
    assert evaluate(Table(3), batches, task=boxes).loss is None
    assert unlabelled.accuracy_name == "agreement"
    assert boxes.accuracy_name == "R²"


def test_uneven_batches_weigh_each_image_the_same() -> None:
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    images = logits_as_images(logits)
    uneven = evaluate(Table(2), in_batches(images, labels, 2))
    whole = evaluate(Table(2), in_batches(images, labels, 3))
    assert uneven.metric == whole.metric == pytest.approx(2 / 3)
    assert uneven.loss == pytest.approx(whole.loss)


def test_a_label_beyond_the_classes_is_named() -> None:
    batches = in_batches(random_images(2), torch.tensor([0, 7]), 2)
    expected = "label 7, but the network has 5 classes"
    with pytest.raises(DataError, match=expected):
        evaluate(Table(5), batches)


def test_a_negative_label_is_named() -> None:
    with pytest.raises(DataError, match="label -1"):
        check_labels(torch.tensor([0, -1]), 5)


def test_no_label_at_all_is_in_range() -> None:
    check_labels(torch.zeros(0, dtype=torch.int64), 5)
    check_labels(torch.tensor([0, 4]), 5)


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="there are no images to score"):
        evaluate(Table(5), [])


def test_macs_of_a_convolution_and_a_linear_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),  # 4x4 positions, 27 inputs, 4 filters
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2, bias=False),  # 4x4 positions, 2 inputs, 6 filters
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    expected = 16 * 27 * 4 + 16 * 2 * 6 + 96 * 10
    assert count_macs(model, random_images(1)) == expected


def test_macs_and_parameters_in_the_score_are_for_one_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    score = evaluate(model, in_batches(random_images(7), torch.zeros(7).long(), 3))
    assert score.macs == 192 * 5
    assert score.parameters == 192 * 5 + 5


def test_a_shared_parameter_is_counted_once() -> None:
    model = make_network("tied_weights")
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    score = evaluate(model, in_batches(random_images(2), torch.zeros(2).long(), 2))
    assert score.parameters == sum(unique.values())


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("label", [1, 9])
def test_modes_are_restored_even_when_scoring_fails(label: int) -> None:
    model = make_network("chain").train()
    model.get_submodule("bn1").eval()
    modes = modes_of(model)
    batches = in_batches(random_images(2), torch.tensor([0, label]), 2)
    if label < 5:
        evaluate(model, batches)
    else:
        with pytest.raises(DataError):
            evaluate(model, batches)
    assert modes_of(model) == modes


def test_scoring_is_in_evaluation_mode_and_changes_no_statistics() -> None:
    model = make_network("chain")
    images, labels = random_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    with torch.no_grad():
        top1, _, loss = by_hand(model(images), labels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score = evaluate(model.train(), in_batches(images, labels, 4))
    assert score.metric == top1
    assert score.loss == pytest.approx(loss, rel=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("count", [1, 3, LATENCY_BATCH, LATENCY_BATCH + 5])
def test_latency_is_that_of_whole_batches(count: int) -> None:
    model = Table(5)
    median, size = latency_ms(model, random_images(count))
    assert median > 0
    assert size == LATENCY_BATCH
    assert set(model.sizes) == {1, LATENCY_BATCH}


def test_score_has_a_positive_latency() -> None:
    score = evaluate(Table(5), in_batches(random_images(2), torch.zeros(2).long(), 2))
    assert score.latency_ms > 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(7, 5)),
            r"can't be run on images \[2, 3, 8, 8\]: mat1",
        ),
        (nn.LSTM(8, 8), "can't be run on images"),
        (nn.MultiheadAttention(8, 1), "can't be run on images"),
    ],
)
def test_a_network_that_gives_no_logits_is_said_to(model: nn.Module, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(model, in_batches(random_images(2), torch.zeros(2).long(), 2))


def test_lack_of_memory_is_not_reported_as_a_fault_of_the_network() -> None:
    class Large(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate"):
        evaluate(Large(), in_batches(random_images(2), torch.zeros(2).long(), 2))
