"""Metrics of segmentation: mean IoU and pixel accuracy, against masks or another network's."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from secateur.data import Batch
from secateur.data.images import IGNORED
from secateur.models.examine import run_network
from secateur.models.score import MetricUnit
from secateur.models.task import Task, check_labels
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError

MapFigure = Literal["mIoU", "pixel accuracy"]


class MapAgreement:
    """Mean IoU (Jaccard index) over classes and pixel accuracy, from counts of all pixels.

    The network's logits are resized bilinearly to the masks. Pixels of class `IGNORED` count for
    nothing, nor do classes that neither the masks nor the network show. With `original` there are
    no masks: the maps of the original network take their place.
    """

    unit: MetricUnit = "%"

    def __init__(
        self,
        task: Task,
        class_names: tuple[str, ...] = (),
        *,
        main: MapFigure = "mIoU",
        original: nn.Module | None = None,
    ) -> None:
        if task.kind != "segmentation":
            raise UsageError(f"{main} needs a class for each position; the task is {task.kind}")
        self.name = main if original is None else f"{main} to original"
        self._main, self._task, self._class_names = main, task, class_names
        self._original = original
        self._pairs: Int[Tensor, "wanted predicted"] | None = None
        """Number of pixels by the class they should have and the one they are given."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        logits = self._task.read_maps(output)
        if self._original is None:
            wanted = batch.labels.to(logits.device)
            if wanted.ndim != logits.ndim - 1:
                raise DataError(
                    f"{self.name} needs a mask for each image; labels are {list(wanted.shape)}"
                )
        else:
            wanted = self._task.read_maps(run_network(self._original, batch.images)).argmax(1)
        classes = logits.shape[1]
        check_labels(wanted[wanted != IGNORED], classes)
        if logits.shape[2:] != wanted.shape[1:]:
            mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[logits.ndim]
            logits = F.interpolate(logits.float(), wanted.shape[1:], mode=mode, align_corners=False)
        counts = wanted != IGNORED
        pairs = wanted[counts] * classes + logits.argmax(1)[counts]
        table = pairs.bincount(minlength=classes**2).reshape(classes, classes).cpu()
        self._pairs = table if self._pairs is None else self._pairs + table

    def merge(self) -> None:
        """Add up the counts of all processes."""
        tables = [table for table in distributed.all_gather(self._pairs) if table is not None]
        self._pairs = torch.stack(tables).sum(0) if tables else None

    def compute(self) -> dict[str, float]:
        """Return mean IoU and pixel accuracy, the main one first, then the IoU of each class."""
        if self._pairs is None or not int(self._pairs.sum()):
            raise DataError(f"{self.name}: no pixel of the masks has a class")
        right = self._pairs.diagonal()
        union = self._pairs.sum(0) + self._pairs.sum(1) - right
        shown = union.nonzero()[:, 0].tolist()
        by_class = {number: int(right[number]) / int(union[number]) for number in shown}
        figures: dict[MapFigure, float] = {
            "mIoU": sum(by_class.values()) / len(by_class),
            "pixel accuracy": int(right.sum()) / int(self._pairs.sum()),
        }
        other: MapFigure = "pixel accuracy" if self._main == "mIoU" else "mIoU"
        names = self._class_names
        return {self.name: figures[self._main], other: figures[other]} | {
            f"IoU {names[n] if n < len(names) else n}": value for n, value in by_class.items()
        }
