"""The section `data` of the configuration: the images, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from secateur.config.image_size import ImageSize
from secateur.config.section import Section

Resizing = Literal["bilinear", "bicubic"]
"""Antialiased interpolation of resized images."""
Fit = Literal["crop", "letterbox", "stretch"]
PadPlace = Literal["centre", "top-left"]
ChannelOrder = Literal["rgb", "bgr"]

PREPROCESSING_KEYS = (
    *("image_size", "fit", "pad_value", "pad_at"),
    *("mean", "std", "interpolation", "channel_order", "value_range"),
)
"""Keys of the configuration's section `data` that say how images are prepared for a network."""


def _as_texts(value: object) -> object:
    """Return a name, a number or a list of them as a list of texts."""
    values = value if isinstance(value, list | tuple) else [value]
    is_known = all(isinstance(v, str | int) and not isinstance(v, bool) for v in values)
    return [str(v) for v in values] if is_known else value


class DataSection(Section):
    """The images."""

    source: str
    """Data set: cifar10:DIR, imagenet:DIR, folder:DIR (one folder per class), segmentation:DIR,
    coco:DIR, yolo:DIR, images:DIR (no labels), hf:NAME, path/to/file.py:loader, …;
    `secateur models` lists all kinds. `synthetic` needs no images: they are synthesised from the
    network's batch norms."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Fraction of the training images held out for validation, such as choosing an epoch."""
    calibration_images: int = Field(default=2000, ge=1)
    """Number of training images used to score filters and to refit the remaining weights."""
    synthetic_images: int | None = Field(default=None, ge=0)
    """Number of images that are synthesised from the network's batch norms: without images
    (`source = "synthetic"`), by default 256; and beside the calibration images, by default 256 if
    these are at most 128, and of at most 64 pixels a side."""
    keep_classes: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ()
    """Keep these classes only, by name or number (`cat,dog` or `3,5`): the head is cut to their
    outputs, in the order of the original head, and images of other classes are left out. Without
    labels those images stay that the network takes for one of them."""
    stratified: bool = True
    """Draw the same number of calibration images from every class; otherwise ignore the labels."""
    image_size: ImageSize | None = None
    """Side of the square input images in pixels, or height and width (`256,352`); by default the
    size the network was made for, or for a network from a file of your own the size that all images
    are stored in, else 224."""
    fit: Fit | None = None
    """How images get that size: `crop` resizes the shorter side and cuts the middle out;
    `letterbox` resizes the longer side and pads the rest; `stretch` ignores the aspect ratio. By
    default as the network was trained."""
    pad_value: int | None = Field(default=None, ge=0, le=255)
    """With `fit = "letterbox"`: grey value from 0 to 255 of the padding; by default the network's,
    else 114."""
    pad_at: PadPlace | None = None
    """With `fit = "letterbox"`: whether a padded image lies in the middle (`centre`) or at the
    `top-left`; by default as the network was trained."""
    mean: tuple[float, ...] | None = Field(default=None, min_length=1, max_length=3)
    """Mean per channel (three, or one of grey) of values from 0 to 1; by default the network's."""
    std: tuple[float, ...] | None = Field(default=None, min_length=1, max_length=3)
    """Standard deviation per channel, of values from 0 to 1; by default the network's."""
    interpolation: Resizing | None = None
    """Interpolation for resizing images; by default the network's."""
    channel_order: ChannelOrder | None = None
    """Order of the colours in the network's input; by default the network's. `mean` and `std` are
    of red, green and blue in either."""
    value_range: Literal[1, 255] | None = None
    """What normalised values are multiplied by: 255, with a mean of 0 and a deviation of 1, for a
    network that takes values from 0 to 255; by default the network's, else 1."""
    ignore_index: int | None = Field(default=None, ge=0, le=65535)
    """Value of the pixels of masks that count for nothing; by default 255, and values that the data
    calls `unlabelled`, `void` or `ignore`."""
    batch_size: int = Field(default=100, ge=2)
    """Images per batch in scoring, refit and evaluation."""
    skip_unreadable: bool = False
    """Skip and count image files that cannot be read instead of stopping with an error."""

    @model_validator(mode="after")
    def _check_keep_classes(self) -> DataSection:
        if self.source == "synthetic" and self.keep_classes:
            raise ValueError(
                "keep_classes chooses images by the classes that they show, and synthesised images "
                "show none: give images"
            )
        return self
