"""Networks that don't fit their test images are noticed, and others are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import Chain, make_network
from secateur.models.plausibility import (
    expected_agreement,
    find_constant,
    find_doubt,
    looks_untrained,
    twice,
)
from secateur.runtime.errors import AccuracyError


def labels_of(count: int, classes: int, generator: torch.Generator) -> Tensor:
    return torch.randint(classes, (count,), generator=generator)


def mostly_right(labels: Tensor, classes: int, fraction: float, seed: int = 0) -> Tensor:
    """Predictions of which a fraction is right, and the others are of the class before."""
    generator = torch.Generator().manual_seed(seed)
    is_right = torch.rand(len(labels), generator=generator) < fraction
    return torch.where(is_right, labels, (labels - 1) % classes)


@pytest.mark.parametrize(
    ("classes", "count", "fraction"),
    [
        (2, 200, 0.8),
        (3, 200, 0.65),
        (10, 200, 0.35),
        (10, 40, 0.5),
        (1000, 300, 0.05),
        (5, 12, 0.7),
    ],
)
def test_a_network_that_is_far_better_than_chance_is_not_doubted(
    classes: int, count: int, fraction: float, generator: torch.Generator
) -> None:
    labels = labels_of(count, classes, generator)
    scattered = torch.randint(classes, (count,), generator=generator)
    is_right = torch.rand(count, generator=generator) < fraction
    assert find_doubt(torch.where(is_right, labels, scattered), labels, classes) is None


@pytest.mark.parametrize(
    ("classes", "count"), [(2, 200), (3, 100), (10, 30), (10, 500), (1000, 200)]
)
def test_a_network_that_guesses_is_doubted(
    classes: int, count: int, generator: torch.Generator
) -> None:
    labels, predicted = (labels_of(count, classes, generator) for _ in range(2))
    doubt = find_doubt(predicted, labels, classes)
    assert doubt is not None
    assert f"% of {count} test images, and chance is" in doubt.text
    with pytest.raises(AccuracyError, match="class order, image size, mean and deviation"):
        doubt.raise_unless(allowed=False)
    doubt.raise_unless(allowed=True)
    assert doubt.note("before pruning, ").startswith("Before pruning, the network is right on")


def test_few_images_are_no_reason_to_doubt(generator: torch.Generator) -> None:
    labels = torch.tensor([0, 1, 2, 3])
    assert find_doubt(torch.tensor([0, 3, 1, 2]), labels, 10) is None


def test_most_of_an_unbalanced_data_set_is_right_by_chance(generator: torch.Generator) -> None:
    labels = (torch.arange(400) % 10 == 0).long()
    doubt = find_doubt(torch.zeros(400).long(), labels, 2)
    assert doubt is not None
    assert "right on 90.0 %" in doubt.text
    assert "chance is 90.0 %" in doubt.text
    assert find_doubt(mostly_right(labels, 2, 0.98), labels, 2) is None


def test_a_network_in_another_class_order_is_told_the_order(generator: torch.Generator) -> None:
    labels = labels_of(300, 6, generator)
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    doubt = find_doubt(order[mostly_right(labels, 6, 0.9)], labels, 6)
    assert doubt is not None
    assert (
        "with its classes in another order (label 0 is output 2, label 1 is output 0" in doubt.text
    )
    assert "and 3 more" in doubt.text
    assert doubt.remedy


def test_two_of_many_classes_that_changed_places_are_noticed(generator: torch.Generator) -> None:
    labels = labels_of(600, 6, generator)
    order = torch.tensor([0, 1, 2, 3, 5, 4])
    doubt = find_doubt(order[labels], labels, 6)
    assert doubt is not None
    assert "(label 4 is output 5, label 5 is output 4)" in doubt.text


def test_an_output_of_the_wrong_sign_is_noticed(generator: torch.Generator) -> None:
    labels = labels_of(60, 2, generator)
    doubt = find_doubt(1 - mostly_right(labels, 2, 0.95), labels, 2)
    assert doubt is not None
    assert "label 0 is output 1, label 1 is output 0" in doubt.text


def test_classes_that_are_confused_are_not_taken_for_another_order(
    generator: torch.Generator,
) -> None:
    labels = labels_of(400, 5, generator)
    predicted = torch.where(labels == 4, 3, labels)  # one class is never predicted
    assert find_doubt(predicted, labels, 5) is None


def test_one_prediction_for_all_is_chance_and_not_another_order() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 30)
    doubt = find_doubt(torch.full((120,), 2), labels, 3)
    assert doubt is not None
    assert "another order" not in doubt.text


def test_labels_of_one_class_are_said_to_show_little() -> None:
    labels = torch.full((40,), 3)
    doubt = find_doubt(labels, labels, 5)
    assert doubt is not None
    assert "40 test images of class 3 alone" in doubt.text
    doubt.raise_unless(allowed=False)
    wrong = find_doubt(torch.zeros(40).long(), labels, 5)
    assert wrong is not None
    assert wrong.remedy


def test_several_labels_are_doubted_label_by_label(generator: torch.Generator) -> None:
    labels = (torch.rand(200, 6, generator=generator) < 0.1 * torch.arange(1, 7)).long()
    flipped = torch.rand(200, 6, generator=generator) < 0.05
    assert find_doubt(labels ^ flipped, labels, 2) is None
    guessed = (torch.rand(200, 6, generator=generator) < 0.1 * torch.arange(1, 7)).long()
    doubt = find_doubt(guessed, labels, 2)
    assert doubt is not None
    assert "1200 test labels" in doubt.text
    columns = torch.tensor([1, 2, 3, 4, 5, 0])
    shuffled = find_doubt(labels[:, columns], labels, 2)
    assert shuffled is not None
    assert "another order" in shuffled.text


def test_the_same_prediction_for_all_is_noticed_without_labels() -> None:
    doubt = find_constant(torch.full((30,), 2))
    assert doubt is not None
    doubt.raise_unless(allowed=False)
    assert find_constant(torch.tensor([0, 1, 1])) is None
    one_sign = find_constant(torch.ones(30).long(), is_binary=True)
    assert one_sign is not None
    with pytest.raises(AccuracyError, match="above 0 for all 30 test images"):
        one_sign.raise_unless(allowed=True)


def test_twice_chance() -> None:
    assert twice(0.1) == pytest.approx(0.2)
    assert twice(0.25) == 0.5
    assert twice(1 / 3) == 0.5
    assert twice(0.5) == pytest.approx(2 / 3)
    assert twice(0.9) < 1


def test_chance_is_cohens(generator: torch.Generator) -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert expected_agreement(torch.tensor([0, 1, 0, 1]), labels, 2) == pytest.approx(0.5)
    assert expected_agreement(torch.tensor([0, 0, 0, 0]), labels, 2) == pytest.approx(0.75)


def test_a_network_before_training_looks_untrained() -> None:
    assert looks_untrained(Chain())
    assert not looks_untrained(make_network("chain"))  # its norms have statistics


@pytest.mark.parametrize("layer", [0, 3])
def test_weights_beyond_the_bounds_of_the_first_draw_are_trained(layer: int) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert looks_untrained(plain)
    with torch.no_grad():
        next(plain[layer].parameters()).mul_(2)
    assert not looks_untrained(plain)
