"""COCO's average precision of a detector, against annotated objects or another detector's."""

from __future__ import annotations

from torch import nn

from secateur.data import Batch
from secateur.data.detections import Decoder, Detections
from secateur.data.objects import Objects
from secateur.models.examine import run_network
from secateur.models.metrics.coco import Evaluation, ImageObjects, Shape, as_objects, image_objects
from secateur.models.metrics.requirements import require
from secateur.models.score import MetricUnit
from secateur.runtime import distributed
from secateur.runtime.errors import DataError, UsageError

SURE = 0.25
"""Score above which the original network's boxes count as objects."""


class AveragePrecision:
    """AP of boxes, masks or keypoints over IoU 0.5 to 0.95; AP50, AP75, by size and by class.

    `decode` makes boxes of the network's output. With `original` no annotation is needed: the
    objects are those that the original network finds with a score above `SURE`, and F1, at an IoU
    of 0.5, says how many of them are found again and how many others are.
    """

    unit: MetricUnit = "%"

    def __init__(
        self,
        decode: Decoder,
        shape: Shape = "box",
        class_names: tuple[str, ...] = (),
        *,
        original: nn.Module | None = None,
    ) -> None:
        require("pycocotools.coco", f"{shape} AP")  # before the first image is read
        self.name = f"{shape} AP" if original is None else f"{shape} AP to original"
        self._decode, self._shape, self._class_names = decode, shape, class_names
        self._original = original
        self._images: list[ImageObjects] = []

    def update(self, network: nn.Module, output: object, batch: Batch) -> None:
        """Add a batch; see `Metric.update`."""
        del network
        size = (int(batch.images.shape[2]), int(batch.images.shape[3]))
        objects: tuple[Objects, ...]
        if self._original is not None:
            theirs = self._find(run_network(self._original, batch.images), batch, size)
            objects = tuple(as_objects(detections, size, SURE) for detections in theirs)
        elif batch.targets is None:
            raise DataError(f"{self.name} needs annotated objects, and the data has none")
        else:
            objects = batch.targets
        detections = self._find(output, batch, size)
        for index, wanted, mine in zip(batch.indices.tolist(), objects, detections, strict=True):
            self._images.append(image_objects(index, wanted, mine, size, self._shape))

    def _find(self, output: object, batch: Batch, size: tuple[int, int]) -> list[Detections]:
        detections = self._decode(output, size)
        if len(detections) != len(batch.images):
            raise UsageError(
                f"the decoder returns detections of {len(detections)} images for "
                f"{len(batch.images)} images"
            )
        return detections

    def merge(self) -> None:
        """Gather the objects of all processes, in the order of the images."""
        images = [image for part in distributed.all_gather(self._images) for image in part]
        self._images = sorted(images, key=lambda image: image.index)

    def evaluation(self) -> Evaluation:
        """Return the evaluation of the images so far, for figures beyond those of `compute`."""
        return Evaluation(self._images, self._shape)

    def compute(self) -> dict[str, float]:
        """Return AP, then the other figures by name."""
        evaluation = self.evaluation()
        figures = evaluation.figures(self._class_names)
        main = {self.name: figures.pop("AP")}
        if self._original is not None:
            main["F1"] = evaluation.f1(SURE)
        return main | figures
