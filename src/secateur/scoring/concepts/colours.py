"""Colours: the eleven basic colour terms, from the pixels alone.

The terms are those of Berlin & Kay (Basic Color Terms, 1969). A colour gets the name of the nearest
named colour of CSS (CSS Color Module Level 4, section 6.1) in CIE 1976 L*a*b*; a named colour
counts for the term that its name ends with (`skyblue` is blue). The CSS values of the terms alone
are too saturated: nearly every pixel of a photograph would be nearest to black, white or grey.
Network Dissection takes the names that van de Weijer et al. (IEEE TIP 2009) learnt from web images;
their table is as fine as the one here, 32 steps for each primary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.data.concept_masks import UNLABELLED, Concept, ConceptMasks
from secateur.runtime.errors import UsageError
from secateur.scoring.concepts import ConceptInput, ConceptSource, SourceContext

LARGEST_GRID = 56
"""The most rows and columns of cells that images are averaged to before 8-bit rounding."""
STEPS = 32
"""Steps of each primary in the table of names; a bin gets the name of the colour at its middle."""

PROTOTYPES: dict[str, str] = {
    "black": "000000",
    "white": "ffffff fffaf0 f8f8ff faebd7 ffdead",
    "red": "ff0000 8b0000 cd5c5c c71585 ff4500 db7093",
    "green": "008000 006400 556b2f 8fbc8f 228b22 7cfc00 90ee90 20b2aa 32cd32 3cb371 00fa9a 98fb98 "
    "2e8b57 00ff7f 9acd32",
    "yellow": "ffff00 adff2f fafad2 ffffe0",
    "blue": "0000ff f0f8ff 5f9ea0 6495ed 00008b 483d8b 00bfff 1e90ff add8e6 87cefa b0c4de 0000cd "
    "7b68ee 191970 b0e0e6 4169e1 87ceeb 6a5acd 4682b4",
    "brown": "a52a2a bc8f8f 8b4513 f4a460",
    "orange": "ffa500 ff8c00",
    "pink": "ffc0cb ff1493 ff69b4 ffb6c1",
    "purple": "800080 9370db 663399",
    "grey": "808080 a9a9a9 2f4f4f 696969 d3d3d3 778899 708090",
}
"""sRGB values by basic term, of the CSS colours whose names end with it; its own value is first."""

# For the primaries and the white point D65 (IEC 61966-2-1, section 5.2).
_XYZ_OF_LINEAR = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


class Colours(ConceptSource):
    """Where an image is black, white, red, green, yellow, blue, brown, orange, pink, purple, grey.

    Names are those of the pixels that the network sees, so of the resized image.
    """

    def __init__(self, context: SourceContext) -> None:
        shape = context.graph.image.meta["val"].shape
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise UsageError(
                "the concept source colours needs pictures of 1 or 3 channels, and an image here "
                f"is {list(shape[1:])}: use evidence, saliency or factors"
            )
        self._preprocessing = context.preprocessing
        self._names = names_of_bins()

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """The eleven basic colours."""
        return tuple(Concept(name, "colour") for name in PROTOTYPES)

    def find(self, concept_input: ConceptInput) -> ConceptMasks:
        """Return a region for each colour in an image, on a grid of at most 56×56 cells."""
        names = self.names(concept_input.images)[:, None]
        indices = torch.arange(len(PROTOTYPES), device=names.device)
        masks = names == indices[:, None, None]  # [image, colour, h, w]
        indices = indices.expand(masks.shape[:2])
        return ConceptMasks(masks, torch.where(masks.any(dim=3).any(dim=2), indices, UNLABELLED))

    def names(self, images: Float[Tensor, "image rgb height width"]) -> Int[Tensor, "image h w"]:
        """Return the index of each cell's colour."""
        size = (min(LARGEST_GRID, images.shape[2]), min(LARGEST_GRID, images.shape[3]))
        cells = self._preprocessing.colours(F.adaptive_avg_pool2d(images, size))
        levels = (cells * 255).round().clamp(0, 255).long()
        levels = levels.expand(-1, 3, -1, -1)  # of grey images
        red, green, blue = (levels * STEPS).div(256, rounding_mode="floor").unbind(1)
        names = self._names.to(images.device)
        return names[(red * STEPS + green) * STEPS + blue]


def names_of_bins() -> Int[Tensor, "bin"]:
    """Return the index of the colour at each bin's middle; red changes slowest, blue fastest."""
    middles = (torch.arange(STEPS).double() + 0.5) / STEPS
    colours = torch.cartesian_prod(middles, middles, middles)
    prototypes = torch.tensor(
        [
            [int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)]
            for values in PROTOTYPES.values()
            for value in values.split()
        ],
        dtype=torch.float64,
    )
    terms = torch.tensor(
        [index for index, values in enumerate(PROTOTYPES.values()) for _ in values.split()]
    )
    # From differences: distances from matrix products would turn near ties into ties.
    distances = torch.cdist(
        lab(colours), lab(prototypes), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return terms[distances.argmin(1)]


def lab(colours: Float[Tensor, "colour 3"]) -> Float[Tensor, "colour 3"]:
    """Return CIE 1976 L*a*b* under D65 of sRGB values in 0 to 1.

    Source: IEC 61966-2-1; CIE 15:2004, section 8.2.1.
    """
    linear = torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(_XYZ_OF_LINEAR, dtype=colours.dtype)
    relative = linear @ matrix.T / matrix.sum(1)  # X / Xn, Y / Yn, Z / Zn
    knee = 6 / 29
    bent = torch.where(
        relative > knee**3,
        relative.clamp(min=knee**3) ** (1 / 3),
        relative / (3 * knee**2) + 4 / 29,
    )
    x, y, z = bent.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
