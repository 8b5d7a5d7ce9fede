from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import ImageColor
from torch import Tensor

from concept_inputs import context_of
from networks import CLASSES, make_network
from secateur.data.concept_masks import UNLABELLED
from secateur.data.preprocessing import Preprocessing
from secateur.scoring.concepts import ConceptInput
from secateur.scoring.concepts.colours import LARGEST_GRID, PROTOTYPES, STEPS, Colours, lab

NAMES = list(PROTOTYPES)
PREPROCESSING = Preprocessing(8, 8, (0.3, 0.5, 0.6), (0.2, 0.25, 0.3))


def colours() -> Colours:
    return Colours(replace(context_of(make_network("chain")), preprocessing=PREPROCESSING))


def concept_input(pixels: Tensor) -> ConceptInput:
    """Of 8-bit pixels `[image, rgb, height, width]`."""
    images = PREPROCESSING.normalise(pixels)
    count = len(images)
    return ConceptInput(images, torch.arange(count), None, None, None, torch.zeros(count, CLASSES))


def flat(*values: tuple[int, int, int], side: int = 8) -> Tensor:
    pixels = torch.tensor(values, dtype=torch.uint8)
    return pixels[:, :, None, None].expand(-1, 3, side, side)


def slow_lab(red: float, green: float, blue: float) -> tuple[float, float, float]:
    """One colour, from values of 0 to 1."""

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)

    def bent(value: float) -> float:
        return float(value ** (1 / 3)) if value > 216 / 24389 else (24389 / 27 * value + 16) / 116

    r, g, b = linear(red), linear(green), linear(blue)
    x = bent((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505)
    y = bent(0.2126 * r + 0.7152 * g + 0.0722 * b)
    z = bent((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def slow_name(red: float, green: float, blue: float) -> str:
    converted = slow_lab(red, green, blue)

    def distance(value: str) -> float:
        parts = [int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        return sum((a - b) ** 2 for a, b in zip(converted, slow_lab(*parts), strict=True))

    return min(
        (min(distance(value) for value in values.split()), name)
        for name, values in PROTOTYPES.items()
    )[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("white", (100.0, 0.0, 0.0)),
        ("red", (53.24, 80.09, 67.20)),
        ("lime", (87.73, -86.18, 83.18)),
        ("blue", (32.30, 79.19, -107.86)),
        ("grey", (53.59, 0.0, 0.0)),
        ("black", (0.0, 0.0, 0.0)),
    ],
)
def test_lab_values_are_the_published_ones(value: str, expected: tuple[float, ...]) -> None:
    colour = lab(torch.tensor([ImageColor.getrgb(value)]).double() / 255)[0]
    torch.testing.assert_close(colour, torch.tensor(expected).double(), rtol=0, atol=0.05)


def test_lab_equals_the_formula_colour_by_colour(generator: torch.Generator) -> None:
    values = torch.rand(50, 3, generator=generator, dtype=torch.float64)
    values[:10] *= 0.01  # below both knees
    expected = [slow_lab(*value) for value in values.tolist()]
    torch.testing.assert_close(lab(values), torch.tensor(expected).double(), rtol=0, atol=1e-4)


def test_prototypes_are_the_css_colours_whose_name_ends_with_the_term() -> None:
    css = {name: bytes(ImageColor.getrgb(name)).hex() for name in ImageColor.colormap}
    assert len(NAMES) == 11
    for term, values in PROTOTYPES.items():
        assert set(values.split()) == {css[name] for name in css if name.endswith(term)}
        assert values.split()[0] == css[term]


@pytest.mark.parametrize("term", NAMES)
def test_a_prototype_has_its_own_name(term: str) -> None:
    values = [ImageColor.getrgb(f"#{value}")[:3] for value in PROTOTYPES[term].split()]
    names = colours().names(concept_input(flat(*((r, g, b) for r, g, b in values))).images)
    assert (names == NAMES.index(term)).float().mean() >= 0.8  # some lie between two bins
    assert int(names[0, 0, 0]) == NAMES.index(term)


def test_pixels_are_named_like_the_middle_of_their_bin(generator: torch.Generator) -> None:
    pixels = torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    masks = colours().find(concept_input(pixels))
    assert masks.masks.shape == (2, 11, 8, 8)
    assert torch.equal(masks.masks.sum(1), torch.ones(2, 8, 8).long())
    width = 256 // STEPS
    for image in range(2):
        for row in range(8):
            for column in range(8):
                bins = [int(value) // width for value in pixels[image, :, row, column]]
                name = slow_name(*((index + 0.5) / STEPS for index in bins))
                assert masks.masks[image, NAMES.index(name), row, column]


def test_bins_rarely_change_a_name(generator: torch.Generator) -> None:
    pixels = torch.randint(256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    names = colours().names(concept_input(pixels).images).flatten().tolist()
    exact = [
        NAMES.index(slow_name(*(value / 255)))
        for value in pixels.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    ]
    same = sum(one == other for one, other in zip(names, exact, strict=True))
    assert same / len(exact) > 0.93


def test_colours_that_an_image_does_not_show_are_absent() -> None:
    pixels = flat((250, 250, 250), (200, 20, 20))
    pixels = pixels.clone()
    pixels[1, :, :4] = torch.tensor([20, 20, 200], dtype=torch.uint8)[:, None, None]
    masks = colours().find(concept_input(pixels))
    shown = [{NAMES[n] for n in row if n != UNLABELLED} for row in masks.concepts.tolist()]
    assert shown == [{"white"}, {"red", "blue"}]
    assert masks.masks[1, NAMES.index("blue"), :4].all()
    assert masks.masks[1, NAMES.index("red"), 4:].all()


def test_large_images_are_averaged_first() -> None:
    tiles = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    tiles[0, :, 0, 0] = tiles[0, :, 1, 1] = 255
    pixels = tiles.repeat(1, 1, LARGEST_GRID, LARGEST_GRID)  # black and white, pixel by pixel
    masks = colours().find(concept_input(pixels))
    assert masks.masks.shape == (1, 11, LARGEST_GRID, LARGEST_GRID)
    assert masks.masks[0, NAMES.index("grey")].all()
    odd = colours().find(concept_input(flat((0, 0, 0), side=75)[..., :40])).masks
    assert odd.shape == (1, 11, LARGEST_GRID, 40)
    assert odd[0, NAMES.index("black")].all()


@pytest.mark.parametrize("value", [0, 17, 128, 255])
def test_normalising_does_not_move_a_pixel_to_another_bin(value: int) -> None:
    bin_width = 256 // STEPS
    source = colours()
    for edge in (value // bin_width * bin_width, value // bin_width * bin_width + bin_width - 1):
        images = concept_input(flat((edge, edge, edge))).images
        assert source.names(images).unique().numel() == 1
        middle = (value // bin_width + 0.5) / STEPS
        assert NAMES[int(source.names(images)[0, 0, 0])] == slow_name(middle, middle, middle)
