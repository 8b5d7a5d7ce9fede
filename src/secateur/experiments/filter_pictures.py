"""Draw the top images of filters, bright where the filter is above its threshold."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from secateur.pipeline.scoring_context import ScoringContext
from secateur.runtime.atomic_io import replace_file
from secateur.scoring.dissection import TopFeatures

SIDE = 96
"""Side of an image, in pixels."""
MOST_FILTERS = 64
"""Filters of a layer that are drawn, at most."""
LABEL_WIDTH = 150


def draw_layer(
    path: Path,
    context: ScoringContext,
    top: TopFeatures,
    labels: Sequence[str],
    order: Sequence[int],
) -> None:
    """Write a PNG with one row per filter: its number, its label (of any lines) and its top images.

    The first of the filters in `order` are drawn, in that order. Images are darkened where the
    filter does not exceed its threshold.
    """
    drawn = list(order[:MOST_FILTERS])
    width = LABEL_WIDTH + top.indices.shape[1] * (SIDE + 2)
    sheet = Image.new("RGB", (width, len(drawn) * (SIDE + 2)), "white")
    text = ImageDraw.Draw(sheet)
    images, positions = top.indices[drawn].unique(return_inverse=True)
    pixels = context.calibration.read(images, context.reader.preprocessing)
    for row, number in enumerate(drawn):
        upper = row * (SIDE + 2)
        text.text(
            (4, upper + SIDE // 2 - 12),
            "\n".join([str(number), *(line[:22] for line in labels[number].split("\n"))]),
            fill="black",
        )
        for column, index in enumerate(positions[row].tolist()):
            tile = _tile(pixels[index], top.regions[number, column])
            sheet.paste(Image.fromarray(tile.numpy()), (LABEL_WIDTH + column * (SIDE + 2), upper))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    replace_file(path, content.getvalue())


def _tile(
    pixels: UInt8[Tensor, "rgb height width"], active: Bool[Tensor, "h w"]
) -> UInt8[Tensor, "row column rgb"]:
    """Return an image at the size of a tile, darkened where the filter is not active.

    The map is resized bilinearly, with pixel centres aligned, and cut at one half.
    """
    size = (SIDE, SIDE)
    image = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
    inside = F.interpolate(active[None, None].float(), size, mode="bilinear")[0] > 0.5
    return image.where(inside, image * 0.3).clamp(0, 255).byte().movedim(0, -1).contiguous()
