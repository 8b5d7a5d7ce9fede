"""Metrics of networks that return values: R², and PSNR and SSIM of restored images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.data import Batch
from secateur.graph.output_values import floating_leaves
from secateur.models.examine import run_network
from secateur.models.metrics.requirements import require
from secateur.models.score import MetricUnit
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError

BEST_PSNR = 100.0
"""PSNR of an image without error, in dB; no other counts as more."""
SMALLEST_SIDE = 11
"""Side of SSIM's window, in pixels."""


class R2:
    """R²: 1 minus the squared error over the variance of what is wanted, over all values.

    The variance is about the mean of each value over images. With `original` there are no labels:
    the original network's outputs take their place, so it is 1 minus the relative squared error.
    """

    unit: MetricUnit = ""

    def __init__(self, *, original: nn.Module | None = None) -> None:
        self.name = "R²" if original is None else "R² to original"
        self._original = original
        self._images = 0
        self._first: Tensor | None = None
        """Wanted values of one image, from which sums count: their squares stay small."""
        self._sums: Tensor | None = None
        """Of each value over images: wanted, its square, and the squared error `[3, value]`."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        actual = _values(output, len(batch.images))
        if self._original is None:
            wanted = batch.labels.reshape(len(batch.labels), -1)
            if wanted.shape != actual.shape:
                raise DataError(
                    f"labels {list(batch.labels.shape)} don't fit the outputs, which have "
                    f"{actual.shape[1]} values for each image: give labels of that form, such as "
                    "--data segmentation:DIR for maps of classes, or images without labels, "
                    "--data images:DIR"
                )
        else:
            wanted = _values(run_network(self._original, batch.images), len(batch.images))
        actual, wanted = actual.cpu().double(), wanted.double().cpu()
        if self._sums is None:
            self._first, self._sums = wanted[0], torch.zeros(3, actual.shape[1]).double()
        assert self._first is not None
        shifted = wanted - self._first
        self._sums += torch.stack(
            [shifted.sum(0), shifted.square().sum(0), (actual - wanted).square().sum(0)]
        )
        self._images += len(actual)

    def merge(self) -> None:
        """Add up the sums of all processes."""
        parts = [
            part
            for part in distributed.all_gather((self._images, self._first, self._sums))
            if part[0]
        ]
        first: Tensor | None = parts[0][1] if parts else None
        total: Tensor | None = None
        for images, start, sums in parts:  # as if each had counted from the first one's values
            assert first is not None
            shift = start - first
            linear, squares, errors = sums
            moved = torch.stack(
                [
                    linear + images * shift,
                    squares + 2 * shift * linear + images * shift.square(),
                    errors,
                ]
            )
            total = moved if total is None else total + moved
        self._images, self._first, self._sums = sum(part[0] for part in parts), first, total

    def compute(self) -> dict[str, float]:
        """Return R²; raises `DataError` if what is wanted is the same for every image."""
        if self._sums is None:
            raise DataError(f"{self.name} needs images")
        linear, squares, errors = self._sums
        variance = float((squares - linear.square() / self._images).sum())
        if variance <= 0:
            raise DataError(f"{self.name} needs two images with different values")
        return {self.name: 1 - float(errors.sum()) / variance}


class ImageQuality:
    """PSNR (in dB) and SSIM (Wang et al., 2004) of output images, means over images.

    Labels are the images that are wanted, `[image, channel, height, width]`, with values from 0 to
    `peak`; outputs beyond that are clipped.
    """

    def __init__(self, main: Literal["PSNR", "SSIM"] = "PSNR", *, peak: float = 1.0) -> None:
        self.name: str = main
        self.unit: MetricUnit = "dB" if main == "PSNR" else ""
        self._functions = require("torchmetrics.functional.image", main)
        self._peak = peak
        self._rows: list[tuple[float, float]] = []
        """PSNR and SSIM of each image."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        images = _leaf(output, len(batch.images)).float()
        wanted = batch.labels.to(images)
        if images.ndim != 4 or images.shape != wanted.shape:
            raise UsageError(
                f"{self.name} compares images [image, channel, height, width]: the network returns "
                f"{list(images.shape)}, labels are {list(wanted.shape)}"
            )
        if min(images.shape[2:]) < SMALLEST_SIDE:
            raise UsageError(
                f"{self.name} needs images of at least {SMALLEST_SIDE}×{SMALLEST_SIDE}, not "
                f"{images.shape[2]}×{images.shape[3]}"
            )
        low, high = float(wanted.min()), float(wanted.max())
        if low < -1e-4 * self._peak or high > (1 + 1e-4) * self._peak:
            raise DataError(
                f"{self.name} takes values from 0 to {self._peak:g}, but those wanted go from "
                f"{low:.3g} to {high:.3g}: name the largest, as in metric = '{self.name}:255'"
            )
        images = images.clamp(0, self._peak)
        options = {"data_range": self._peak, "reduction": "none"}
        psnr = self._functions.peak_signal_noise_ratio(images, wanted, dim=(1, 2, 3), **options)
        ssim = self._functions.structural_similarity_index_measure(images, wanted, **options)
        self._rows += zip(
            psnr.clamp(max=BEST_PSNR).tolist(), ssim.reshape(-1).tolist(), strict=True
        )

    def merge(self) -> None:
        """Gather the images of all processes."""
        self._rows = [row for rows in distributed.all_gather(self._rows) for row in rows]

    def compute(self) -> dict[str, float]:
        """Return the means, the main one first."""
        if not self._rows:
            raise DataError(f"{self.name} needs images")
        psnr, ssim = (math.fsum(values) / len(values) for values in zip(*self._rows, strict=True))
        figures = {"PSNR": psnr, "SSIM": ssim}
        return {self.name: figures.pop(self.name)} | figures


def _values(output: object, images: int) -> Tensor:
    return _leaf(output, images).flatten(1)


def _leaf(output: object, images: int) -> Tensor:
    """Return the first floating tensor of an output."""
    return floating_leaves(output, images)[0]
