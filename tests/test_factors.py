from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concept_inputs import concept_input_of, context_of, select_inputs
from networks import CLASSES, make_network, random_images
from secateur.data.concept_masks import UNLABELLED
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError
from secateur.scoring.concepts import ConceptInput
from secateur.scoring.concepts import factors as module
from secateur.scoring.concepts.factors import Factors, strongest

pytest.importorskip("sklearn")


class Wide(nn.Module):
    """A last map of many channels, whose values the tests make up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.conv(x).mean((2, 3)))
        return logits


def factors_of(channels: int, argument: str = "3") -> Factors:
    return Factors(context_of(Wide(channels).eval(), argument))


def concept_input(value: Tensor, numbers: Tensor | None = None) -> ConceptInput:
    count = len(value)
    numbers = torch.arange(count) if numbers is None else numbers
    return ConceptInput(
        random_images(count), numbers, None, None, value, torch.zeros(count, CLASSES)
    )


def mixture(
    images: int, parts: Tensor, generator: torch.Generator, side: int = 6
) -> tuple[Tensor, Tensor]:
    """Maps whose every position is one of the parts, at some strength; which one it is."""
    which = torch.randint(len(parts), (images, side, side), generator=generator)
    strength = 0.5 + torch.rand(images, side, side, generator=generator)
    return (parts[which] * strength[..., None]).permute(0, 3, 1, 2).contiguous(), which


def taught(factors: Factors, value: Tensor) -> Factors:
    factors.learn(concept_input(value))
    factors.finish_learning()
    return factors


def dictionary_of(factors: Factors) -> Tensor:
    assert factors._dictionary is not None
    return factors._dictionary


def test_disjoint_parts_become_different_factors(generator: torch.Generator) -> None:
    parts = torch.zeros(3, 12)
    for number in range(3):
        parts[number, 4 * number : 4 * number + 4] = 0.2 + torch.rand(4, generator=generator)
    value, which = mixture(8, parts, generator)
    factors = taught(factors_of(12), value)
    regions = factors.find(concept_input(value))
    assert regions.masks.shape == (8, 3, 6, 6)
    named = regions.masks.int().argmax(1)  # [image, h, w]
    assert torch.equal(regions.masks.sum(1), torch.ones(8, 6, 6).long())  # each cell is one part's
    pairs = set(zip(which.flatten().tolist(), named.flatten().tolist(), strict=True))
    assert len(pairs) == 3


def test_the_dictionary_has_unit_length_and_no_negative_value(generator: torch.Generator) -> None:
    factors = taught(factors_of(10, "4"), torch.randn(6, 10, 5, 5, generator=generator))
    dictionary = dictionary_of(factors)
    assert dictionary.shape == (4, 10)
    assert (dictionary >= 0).all()
    torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(4))


def slow_strengths(row: list[float], dictionary: list[list[float]]) -> list[float]:
    """The updates of one position, written out."""
    channels = range(len(row))
    count = range(len(dictionary))
    projected = [sum(max(row[c], 0.0) * dictionary[k][c] for c in channels) for k in count]
    products = [
        [sum(dictionary[i][c] * dictionary[j][c] for c in channels) for j in count] for i in count
    ]
    strengths = list(projected)
    for _ in range(module.UPDATES):
        explained = [sum(products[i][j] * strengths[j] for j in count) for i in count]
        strengths = [
            strengths[i] * projected[i] / explained[i] if projected[i] > 0 else 0.0 for i in count
        ]
    return strengths


def test_strengths_equal_the_updates_position_by_position(generator: torch.Generator) -> None:
    value = torch.randn(3, 9, 4, 5, generator=generator)
    factors = taught(factors_of(9), value)
    strengths = factors.strengths(concept_input(value))
    dictionary = dictionary_of(factors).tolist()
    for image, row, column in ((0, 0, 0), (1, 3, 4), (2, 2, 1), (2, 0, 4)):
        expected = slow_strengths(value[image, :, row, column].tolist(), dictionary)
        torch.testing.assert_close(
            strengths[image, :, row, column], torch.tensor(expected), rtol=1e-4, atol=1e-5
        )


def test_strengths_come_near_the_least_squares_optimum(generator: torch.Generator) -> None:
    from scipy.optimize import nnls

    value = torch.rand(2, 9, 4, 4, generator=generator)
    factors = taught(factors_of(9), value)
    dictionary = dictionary_of(factors).double()
    strengths = factors.strengths(concept_input(value)).double()
    for place in range(16):
        row = value[1].flatten(1)[:, place].double()
        _, best = nnls(dictionary.T.numpy(), row.numpy())
        error = (row - strengths[1].flatten(1)[:, place] @ dictionary).norm()
        assert best - 1e-6 <= error <= best * 1.02 + 1e-3


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(2048, 7, 7), (64, 8, 8), (13, 3, 5), (100, 1, 9)]
)
def test_strengths_of_an_image_are_the_same_to_the_last_bit_in_any_batch(
    channels: int, height: int, width: int, generator: torch.Generator
) -> None:
    value = torch.randn(9, channels, height, width, generator=generator)
    factors = factors_of(channels)
    directions = torch.rand(3, channels, generator=generator)
    factors._dictionary = directions / directions.norm(dim=1, keepdim=True)
    whole = factors.strengths(concept_input(value))
    for start, size in ((0, 1), (8, 1), (2, 2), (3, 5)):
        images = slice(start, start + size)
        assert torch.equal(
            factors.strengths(select_inputs(concept_input(value), images)), whole[images]
        )


def test_a_cell_belongs_to_the_first_of_the_strongest_factors_if_any_is_there() -> None:
    strengths = torch.tensor([[[[0.0, 1.0, 2.0]], [[0.0, 3.0, 2.0]]]])
    assert strongest(strengths)[0, :, 0].tolist() == [[False, False, True], [False, True, False]]


def test_a_factor_that_is_nowhere_strongest_is_absent() -> None:
    factors = factors_of(4)
    factors._dictionary = torch.eye(3, 4)
    value = torch.zeros(2, 4, 2, 2)
    value[0, 1] = 1.0
    regions = factors.find(concept_input(value))
    assert regions.concepts.tolist() == [[UNLABELLED, 1, UNLABELLED], 3 * [UNLABELLED]]
    assert regions.masks[0, 1].all()
    assert int(regions.masks.sum()) == 4


# --- learning -------------------------------------------------------------------------------------


def spread(value: Tensor, shares: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What each of several processes learns that have a share of the images each."""
    several = [factors_of(value.shape[1]) for _ in shares]
    for factors, share in zip(several, shares, strict=True):
        for numbers in torch.tensor(share, dtype=torch.int64).split(2):
            factors.learn(concept_input(value[numbers], numbers))
    rows = [factors._rows for factors in several]

    def gathered(local: Any) -> list[Any]:
        return rows if isinstance(local, dict) else [local]

    monkeypatch.setattr(distributed, "all_gather", gathered)
    for factors in several:
        factors.finish_learning()
    return [dictionary_of(factors) for factors in several]


def test_the_dictionary_does_not_depend_on_how_images_were_spread(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.rand(12, 6, 5, 5, generator=generator)
    (whole,) = spread(value, [list(range(12))], monkeypatch)
    for shares in (
        [list(range(11, -1, -1))],
        [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]],
        [[11, 3], [], [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 10, 10]],
    ):
        for factors in spread(value, shares, monkeypatch):
            assert torch.equal(factors, whole)


def test_no_more_than_some_positions_of_some_images_are_kept(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGES", 4)
    value = torch.rand(10, 5, 8, 8, generator=generator)
    factors = factors_of(5)
    for numbers in (torch.tensor([9, 1, 7]), torch.tensor([3, 8, 0]), torch.tensor([2, 6])):
        factors.learn(concept_input(value[numbers], numbers))
        assert len(factors._rows) <= 4
    assert sorted(factors._rows) == [0, 1, 2, 3]
    for number, rows in factors._rows.items():
        assert rows.shape == (module.POSITIONS, 5)
        there = {tuple(row) for row in value[number].flatten(1).T.tolist()}
        assert {tuple(row) for row in rows.tolist()} <= there
        assert rows.untyped_storage().nbytes() == rows.nbytes  # and nothing larger behind them


def test_negative_features_belong_to_no_factor(generator: torch.Generator) -> None:
    value = torch.randn(5, 6, 4, 4, generator=generator)
    one, other = taught(factors_of(6), value), taught(factors_of(6), value.clamp(min=0))
    assert torch.equal(dictionary_of(one), dictionary_of(other))
    assert torch.equal(
        one.strengths(concept_input(value)), one.strengths(concept_input(value.clamp(min=0)))
    )


def test_factors_of_a_real_network() -> None:
    context = context_of(make_network("chain"), "")
    with pytest.raises(UsageError, match="factors:8 asks for more parts than the 7 channels"):
        Factors(context)
    context = context_of(make_network("chain"), "2")
    factors = Factors(context)
    assert [concept.name for concept in factors.concepts] == ["factor 1", "factor 2"]
    shown = concept_input_of(factors, context, random_images(6))
    factors.learn(shown)
    factors.finish_learning()
    assert factors.find(shown).masks.any(dim=1).float().mean() > 0.5


def _nothing(value: Tensor) -> Tensor:
    return -value


def _infinite(value: Tensor) -> Tensor:
    return value / 0


def _few(value: Tensor) -> Tensor:
    return value[:1, :, :1, :2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_nothing, DataError, "no positive, finite values to find factors in"),
        (_infinite, DataError, "no positive, finite values to find factors in"),
        (_few, UsageError, "factors:3 needs more calibration images: 2 rows are too few"),
    ],
)
def test_maps_without_parts_are_an_error(
    change: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
    generator: torch.Generator,
) -> None:
    factors = factors_of(6)
    factors.learn(concept_input(change(torch.rand(4, 6, 3, 3, generator=generator))))
    with pytest.raises(error, match=message):
        factors.finish_learning()


def test_factors_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of(6)
    factors.learn(concept_input(torch.rand(4, 6, 3, 3)))
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(UsageError, match=r"pip install 'secateur\[factors\]'"):
        factors.finish_learning()
