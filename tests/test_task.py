"""Outputs and labels of every form, read as logits and class numbers."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data import Batch
from secateur.models.evaluate import evaluate
from secateur.models.examine import Outputs, examine_outputs, make_task
from secateur.models.labels import read_all_labels, read_labels
from secateur.models.task import (
    Scale,
    Task,
    as_rows,
    cross_entropy,
    predict,
    select_logits,
    softened_divergence,
)
from secateur.runtime.errors import DataError, NotFiniteError, UsageError

Named = namedtuple("Named", ["logits", "aux_logits"])


class Give(nn.Module):
    """Returns a function of the images' first values, `[image, width]`."""

    def __init__(self, function: Any, width: int = 4) -> None:
        super().__init__()
        self.function, self.width = function, width

    def forward(self, images: Tensor) -> Any:
        return self.function(images.flatten(1)[:, : self.width])


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(8, 3, 4, 4, generator=generator)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1), (6, 4, 1)])
def test_axes_of_size_one_are_dropped(shape: tuple[int, ...]) -> None:
    output = torch.randn(shape)
    assert torch.equal(as_rows(output, 6), output.reshape(6, 4))


@pytest.mark.parametrize(
    ("shape", "images", "rows"), [((6,), 6, (6, 1)), ((), 1, (1, 1)), ((4,), 1, (1, 4))]
)
def test_axes_that_were_squeezed_away_come_back(
    shape: tuple[int, ...], images: int, rows: tuple[int, int]
) -> None:
    assert as_rows(torch.randn(shape), images).shape == rows


@pytest.mark.parametrize("shape", [(6, 4, 2, 2), (6, 5, 4), (3, 4), (4, 6), (5,)])
def test_other_outputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"for 6 images it returns \["):
        as_rows(torch.randn(shape), 6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: (logits, logits * 2),
        lambda logits: [logits, logits * 2],
        lambda logits: {"logits": logits, "features": logits * 2},
        lambda logits: {"out": logits},
        lambda logits: SimpleNamespace(logits=logits, hidden=None),
        lambda logits: Named(logits, logits * 2),
    ],
)
def test_logits_are_selected(wrap: Any) -> None:
    logits = torch.randn(3, 4)
    assert select_logits(wrap(logits)) is logits


@pytest.mark.parametrize("output", [None, {"a": torch.ones(2), "b": torch.ones(2)}, (), "text"])
def test_an_output_without_logits_is_refused(output: object) -> None:
    with pytest.raises(UsageError, match="which has no logits"):
        select_logits(output)


@pytest.mark.parametrize(
    ("function", "scale"),
    [
        (lambda x: x, "logits"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: (x / 3).softmax(1), "softmax"),
        (lambda x: x.log_softmax(1), "log-softmax"),
        (lambda x: x.sigmoid(), "sigmoid"),
        (lambda x: x[:, :1].sigmoid(), "sigmoid"),
        (lambda x: x[:, 0].sigmoid().squeeze(), "sigmoid"),
        (lambda x: x.abs(), "logits"),
        (lambda x: x[:, :1].softmax(1), "logits"),
    ],
)
def test_the_scale_of_outputs_is_told(images: Tensor, function: Any, scale: Scale) -> None:
    assert examine_outputs(Give(function), images).scale == scale


def test_the_scale_is_told_of_a_network_that_runs_without_gradients(images: Tensor) -> None:
    network = Give(torch.no_grad()(lambda x: x.softmax(1)))
    assert examine_outputs(network, images).scale == "softmax"


def test_outputs_that_are_not_numbers_are_not_scored(images: Tensor) -> None:
    network = Give(lambda x: torch.where(x > 0, x, x * torch.nan))
    batch = Batch(images, torch.zeros(8).long(), torch.arange(8))
    with pytest.raises(NotFiniteError, match="outputs are NaN for 8 of 8 images"):
        evaluate(network, [batch])


@pytest.mark.parametrize(("scale", "undone"), [("softmax", True), ("log-softmax", True)])
def test_probabilities_are_read_as_the_logits_that_give_them(
    scale: Scale, undone: bool, generator: torch.Generator
) -> None:
    logits, labels = torch.randn(9, 4, generator=generator), torch.arange(9) % 4
    output = logits.softmax(1) if scale == "softmax" else logits.log_softmax(1)
    read = Task(scale=scale).read(output, 9)
    assert undone
    assert torch.allclose(read.softmax(1), logits.softmax(1), atol=1e-6)
    assert torch.allclose(cross_entropy(read, labels), F.cross_entropy(logits, labels), atol=1e-6)


def test_a_probability_of_zero_stays_finite() -> None:
    read = Task(scale="softmax").read(torch.tensor([[1.0, 0.0]]), 1)
    assert bool(read.isfinite().all())
    read = Task("binary", "sigmoid").read(torch.tensor([1.0, 0.0]), 2)
    assert bool(read.isfinite().all())
    assert predict(read).tolist() == [1, 0]


@pytest.mark.parametrize("scale", ["logits", "sigmoid"])
def test_one_output_is_the_logit_of_class_one(scale: Scale, generator: torch.Generator) -> None:
    z, labels = torch.randn(20, generator=generator), torch.arange(20) % 2
    read = Task("binary", scale).read(z.sigmoid() if scale == "sigmoid" else z, 20)
    assert torch.equal(predict(read), (z > 0).long())
    expected = F.binary_cross_entropy_with_logits(z, labels.float())
    assert torch.allclose(cross_entropy(read, labels), expected, atol=1e-6)


def test_several_labels_have_a_logit_each(generator: torch.Generator) -> None:
    z = torch.randn(7, 3, generator=generator)
    labels = (torch.rand(7, 3, generator=generator) < 0.5).long()
    read = Task("multi-label").read(z, 7)
    assert torch.equal(predict(read), (z > 0).long())
    expected = F.binary_cross_entropy_with_logits(z, labels.float())
    assert torch.allclose(cross_entropy(read, labels), expected, atol=1e-6)
    other = torch.randn(7, 3, generator=generator)
    p, q = ((values / 2).sigmoid() for values in (z, other))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    actual = softened_divergence(Task("multi-label").read(other, 7), read, 2.0)
    assert torch.allclose(actual, kl.mean(), atol=1e-6)


def test_logits_of_one_class_an_image_are_returned_as_they_are() -> None:
    logits = torch.randn(5, 4)
    assert Task().read(logits, 5) is logits


def test_evidence_is_for_the_label_that_is_surest() -> None:
    read = Task("multi-label").read(torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]]), 2)
    assert Task("multi-label").evidence(read, None)[1].tolist() == [1, 0]
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert Task("multi-label").evidence(read, labels)[1].tolist() == [2, 0]


# --- labels ------------------------------------------------------------------------------------

FIVE, ONE = Outputs("rows", 5, "logits", ()), Outputs("rows", 1, "logits", ())
NUMBERS = [0, 4, 2, 1]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor(NUMBERS),
        torch.tensor(NUMBERS).byte(),
        torch.tensor(NUMBERS).float(),
        torch.tensor(NUMBERS)[:, None],
        torch.eye(5)[NUMBERS],
        torch.eye(5)[NUMBERS].bool(),
        torch.eye(5)[NUMBERS] * 2 - 1,
        torch.eye(5)[NUMBERS] * 0.9 + 0.02,
    ],
)
def test_class_numbers_of_any_form_are_read(labels: Tensor) -> None:
    numbers, notes = read_labels(labels, FIVE)
    assert numbers.tolist() == NUMBERS
    assert numbers.dtype == torch.int64
    assert bool(notes) == (labels.shape == (4, 5))


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1, 1]),
        torch.tensor([[0.0], [1.0], [1.0]]),
        torch.tensor([-1, 1, 1]),
        torch.tensor([-1.0, 1.0, 1.0]),
        torch.tensor([False, True, True]),
    ],
)
def test_labels_of_one_output_are_read(labels: Tensor) -> None:
    numbers, _ = read_labels(labels, ONE)
    assert numbers.tolist() == [0, 1, 1]
    assert make_task(ONE, [numbers]).kind == "binary"


def test_rows_of_several_ones_are_several_labels() -> None:
    rows = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    for labels in (rows, rows.bool(), rows.float(), rows * 2 - 1):
        numbers, _ = read_labels(labels, FIVE)
        assert torch.equal(numbers, rows)
        assert make_task(FIVE, [numbers]).kind == "multi-label"


def test_one_hot_rows_are_labels_of_their_own_beside_sigmoids() -> None:
    rows = torch.eye(5).long()
    numbers, _ = read_labels(rows, Outputs("rows", 5, "sigmoid", ()))
    assert torch.equal(numbers, rows)
    assert torch.equal(read_labels(rows, FIVE, "multi-label")[0], rows)


@pytest.mark.parametrize(
    ("labels", "outputs", "words"),
    [
        (torch.tensor([0, 5]), FIVE, r"label 5, but the network has 5 classes, 0 to 4$"),
        (torch.tensor([1, 2, 5]), FIVE, "subtract 1 from labels that count from 1 to 5"),
        (torch.tensor([0, -100]), FIVE, "label -100, .*: leave out images without a label"),
        (torch.tensor([0, -1]), FIVE, "label -1, .*: leave out images without a label"),
        (torch.tensor([0.0, 0.37]), FIVE, "labels hold 0.37, which is not a class number"),
        (torch.tensor([0.2, 0.7]), ONE, "for a regression"),
        (torch.tensor([3.0, 7.0]), ONE, "labels go from 3 to 7, but the network has one output"),
        (torch.tensor([0.0, torch.nan]), FIVE, "not finite"),
        (torch.rand(3, 4), FIVE, r"labels are \[3, 4\], but the network has 5 outputs"),
        (torch.full((2, 5), 0.4), FIVE, "hold 0.4: expected 0 or 1 for each class"),
        (torch.tensor([[0.5, 0.5, 0, 0, 0]]), FIVE, "two classes the same probability, 0.5"),
        (torch.zeros(2, 4, 4), FIVE, r"labels are \[2, 4, 4\]"),
        (torch.zeros(2, 2), ONE, r"labels are \[2, 2\], but the network has 1 outputs"),
    ],
)
def test_labels_without_a_class_are_refused(labels: Tensor, outputs: Outputs, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_labels(labels, outputs)


def test_sets_of_labels_need_one_form() -> None:
    numbers, one_hot = torch.tensor(NUMBERS), torch.eye(5)
    assert [part.tolist() for part in read_all_labels([numbers, numbers[:2]], FIVE)[0]] == [
        NUMBERS,
        NUMBERS[:2],
    ]
    with pytest.raises(DataError, match=r"labels are \[4\] and \[5, 5\]"):
        read_all_labels([numbers, one_hot], FIVE)


# --- tasks -------------------------------------------------------------------------------------


def test_without_labels_the_outputs_tell_the_task() -> None:
    assert make_task(FIVE).kind == "single-label"
    assert make_task(ONE).kind == "binary"
    assert make_task(Outputs("rows", 5, "sigmoid", ())).kind == "multi-label"
    assert make_task(FIVE, kind="multi-label").kind == "multi-label"


def test_two_sigmoids_with_class_numbers_are_two_classes() -> None:
    task = make_task(Outputs("rows", 2, "sigmoid", ()), [torch.tensor([0, 1])])
    read = task.read(torch.tensor([[0.9, 0.6], [0.2, 0.3]]), 2)
    assert task.kind == "single-label"
    assert predict(read).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("outputs", "labels", "kind", "words"),
    [
        (FIVE, [], "binary", "has 5 outputs"),
        (ONE, [], "multi-label", "has 1 outputs"),
        (Outputs("rows", 3, "softmax", ()), [torch.ones(2, 3).long()], "auto", "ends in a softmax"),
        (FIVE, [torch.zeros(2).long(), torch.zeros(2, 5).long()], "auto", r"labels are \[2, 5\]"),
        (FIVE, [torch.tensor([0, 7])], "auto", "label 7"),
        (ONE, [torch.tensor([0, 2])], "auto", "label 2"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(
    outputs: Outputs, labels: list[Tensor], kind: Any, words: str
) -> None:
    with pytest.raises((UsageError, DataError), match=words):
        make_task(outputs, labels, kind)
