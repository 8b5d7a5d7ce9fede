"""Pictures of what filters see: top images, bright where the filter is above its threshold."""

from __future__ import annotations

import io
from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from secateur.config import RunConfig
from secateur.pipeline.prune import ScoringContext, preprocessing
from secateur.runtime.atomic_io import replace_file
from secateur.scoring.dissection import TopFeatures

SIDE = 96
"""Side of an image in a picture, in pixels."""
MOST_FILTERS = 64
"""Filters in a picture: those with the smallest numbers."""
LABEL_WIDTH = 150


def draw_layer(
    path: Path, context: ScoringContext, config: RunConfig, top: TopFeatures, labels: list[str]
) -> None:
    """Writes a PNG with a row a filter: its number and label, and its top images.

    Where a filter is at most at its threshold the image is darkened.
    """
    filters = min(len(top.indices), MOST_FILTERS)
    width = LABEL_WIDTH + top.indices.shape[1] * (SIDE + 2)
    sheet = Image.new("RGB", (width, filters * (SIDE + 2)), "white")
    text = ImageDraw.Draw(sheet)
    wanted, place = top.indices[:filters].unique(return_inverse=True)
    pixels = context.calibration.read(wanted, preprocessing(config))
    for number in range(filters):
        upper = number * (SIDE + 2)
        text.text((4, upper + SIDE // 2 - 12), f"{number}\n{labels[number][:22]}", fill="black")
        for column, index in enumerate(place[number].tolist()):
            tile = _tile(pixels[index], top.regions[number, column])
            sheet.paste(Image.fromarray(tile.numpy()), (LABEL_WIDTH + column * (SIDE + 2), upper))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    replace_file(path, content.getvalue())


def _tile(
    pixels: UInt8[Tensor, "rgb height width"], active: Bool[Tensor, "h w"]
) -> UInt8[Tensor, "row column rgb"]:
    """An image at the size of a picture, darkened where the filter is not active.

    Bilinear up-sampling of the map, cut at one half: pixel centres aligned.
    """
    size = (SIDE, SIDE)
    image = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
    inside = F.interpolate(active[None, None].float(), size, mode="bilinear")[0] > 0.5
    return image.where(inside, image * 0.3).clamp(0, 255).byte().movedim(0, -1).contiguous()
