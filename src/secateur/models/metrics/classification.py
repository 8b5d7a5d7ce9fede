"""Metrics of classifiers: top-k, and the mean average precision of several labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.data import Batch
from secateur.models.metrics.requirements import require
from secateur.models.score import MetricUnit
from secateur.models.task import Task
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError


class TopK:
    """Fraction of images whose class is among the k best."""

    unit: MetricUnit = "%"

    def __init__(self, task: Task, k: int = 1) -> None:
        if task.kind != "single-label":
            raise UsageError(f"top-{k} needs one class for each image; the task is {task.kind}")
        self.name: str = f"top-{k}"
        self._task, self._k = task, k
        self._counts = torch.zeros(2, dtype=torch.int64)
        """Images whose class is found, and all."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        logits = self._task.read(output, len(batch.images))
        best = logits.topk(min(self._k, logits.shape[1]), dim=1).indices.cpu()
        predictions = (best == batch.labels[:, None]).any(1)
        self._counts += torch.tensor([int(predictions.sum()), len(predictions)])

    def merge(self) -> None:
        """Add up the counts of all processes."""
        distributed.all_reduce_sum([self._counts])

    def compute(self) -> dict[str, float]:
        """Return the fraction."""
        predictions, images = self._counts.tolist()
        return {self.name: predictions / images}


class MultiLabelAP:
    """Mean average precision (mAP): the area under each label's precision and recall, averaged.

    Labels that no image has are left out of the mean.
    """

    name = "mAP"
    unit: MetricUnit = "%"

    def __init__(self, task: Task, class_names: tuple[str, ...] = ()) -> None:
        if task.kind != "multi-label":
            raise UsageError(f"mAP needs several labels for each image; the task is {task.kind}")
        self._functions = require("torchmetrics.functional.classification", self.name)
        self._task, self._class_names = task, class_names
        self._rows: list[tuple[Tensor, Tensor]] = []
        """Logits and labels of each batch, `[image, label]`."""

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        logits = self._task.read(output, len(batch.images))
        difference = (logits[..., 1] - logits[..., 0]).cpu().double()
        self._rows.append((difference.sigmoid(), batch.labels))

    def merge(self) -> None:
        """Gather the logits of all processes."""
        self._rows = [row for rows in distributed.all_gather(self._rows) for row in rows]

    def compute(self) -> dict[str, float]:
        """Return the mean, then the average precision of each label."""
        scores, labels = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        shown = (labels == 1).any(0).nonzero()[:, 0].tolist()
        if not shown:
            raise DataError("mAP needs an image that has a label; these have none")
        figures = {
            _named(self._class_names, number): float(
                self._functions.binary_average_precision(scores[:, number], labels[:, number])
            )
            for number in shown
        }
        return {self.name: sum(figures.values()) / len(figures)} | {
            f"AP {name}": value for name, value in figures.items()
        }


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else str(number)
