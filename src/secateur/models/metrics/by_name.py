"""Metrics by name, as `model.metric` names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from secateur.data.detections import Decoder
from secateur.models import user_code
from secateur.models.metrics import Metric, MetricFactory
from secateur.models.metrics.classification import MultiLabelAP, TopK
from secateur.models.metrics.detection import AveragePrecision
from secateur.models.metrics.regression import R2, ImageQuality
from secateur.models.metrics.segmentation import MapAgreement
from secateur.models.metrics.user_function import UserMetric
from secateur.models.task import Task
from secateur.runtime.errors import UnknownName, UsageError


@dataclass(frozen=True, eq=False)
class MetricInputs:
    """What metrics are made from."""

    task: Task
    class_names: tuple[str, ...] = ()
    decode: Decoder | None = None
    """Makes boxes of a detector's output."""
    original: nn.Module | None = None
    """Without labels: the network whose outputs take their place."""


def _average_precision(inputs: MetricInputs, shape: str) -> Metric:
    if inputs.decode is None:
        raise UsageError(
            f"{shape} AP needs a function that makes boxes of the network's output: pass decode="
        )
    return AveragePrecision(
        inputs.decode,
        shape,  # type: ignore[arg-type]
        inputs.class_names,
        original=inputs.original,
    )


METRICS: dict[str, Callable[[MetricInputs], Metric]] = {
    "top-1": lambda inputs: TopK(inputs.task, 1),
    "top-5": lambda inputs: TopK(inputs.task, 5),
    "mAP": lambda inputs: MultiLabelAP(inputs.task, inputs.class_names),
    "mIoU": lambda inputs: MapAgreement(inputs.task, inputs.class_names, original=inputs.original),
    "pixel accuracy": lambda inputs: MapAgreement(
        inputs.task, inputs.class_names, main="pixel accuracy", original=inputs.original
    ),
    "box AP": lambda inputs: _average_precision(inputs, "box"),
    "mask AP": lambda inputs: _average_precision(inputs, "mask"),
    "keypoint AP": lambda inputs: _average_precision(inputs, "keypoint"),
    "PSNR": lambda inputs: ImageQuality("PSNR"),
    "SSIM": lambda inputs: ImageQuality("SSIM"),
    "R2": lambda inputs: R2(original=inputs.original),
}
"""Metrics by name; of `PSNR` and `SSIM` a largest value other than 1 follows a colon."""
AGREEMENTS = frozenset({"mIoU", "pixel accuracy", "box AP", "mask AP", "keypoint AP", "R2"})
"""Metrics that may compare with the original network's outputs."""


def check_name(name: str) -> None:
    """Raise `UnknownName` or `UsageError` if there is no such metric."""
    if name == "auto":
        return
    if user_code.is_user_code(name):
        user_code.check_file(name, "metric")
    elif _peak(name) is None and name not in METRICS:
        raise UnknownName("metric", name, ["auto", *METRICS])


def find_metric(name: str, inputs: MetricInputs) -> MetricFactory | None:
    """Return what makes the named metric; None where `auto` means the accuracy or R² of `evaluate`.

    `auto` is the mean IoU of segmentation, the AP of boxes where there is a decoder, R² of a
    regression with labels, and the accuracy or R² to the original's outputs otherwise. The metric
    is made once to see that it goes together with the task: raises `UsageError` if it does not, or
    if a package is missing.
    """
    if user_code.is_user_code(name):
        function = user_code.find(name, "metric")
        return partial(UserMetric, function, name.rpartition(":")[2])
    if name == "auto":
        kind = inputs.task.kind
        if kind == "segmentation":
            name = "mIoU"
        elif kind == "detection" and inputs.decode is not None:
            name = "box AP"
        elif kind == "regression" and inputs.task.has_labels:
            name = "R2"
        else:
            return None
    check_name(name)
    if inputs.original is not None and name not in AGREEMENTS:
        raise UsageError(f"metric {name!r} needs labels, and the data has none")
    peak = _peak(name)
    if peak is None:
        factory: MetricFactory = partial(METRICS[name], inputs)
    else:
        main = "PSNR" if name.startswith("PSNR") else "SSIM"
        factory = partial(ImageQuality, main, peak=peak)  # type: ignore[arg-type]
    factory()
    return factory


def _peak(name: str) -> float | None:
    """Return the largest value in a name such as `PSNR:255`."""
    main, colon, value = name.partition(":")
    if main not in ("PSNR", "SSIM") or not colon:
        return None
    try:
        peak = float(value)
    except ValueError:
        peak = 0.0
    if not 0 < peak < float("inf"):
        raise UsageError(
            f"metric {name!r}: after the colon comes the largest value, as in PSNR:255"
        )
    return peak
