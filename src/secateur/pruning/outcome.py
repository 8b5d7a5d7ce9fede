"""Records of what planning and refitting did, as they are saved in `result.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.config import RefitForm

BatchNormStatistics = Literal["means", "both"]
Sensitivity = Mapping[str, Sequence[float]]
"""`{group: output error when 0, 1, … up to all channels are removed}`, the last-ranked first."""
SENSITIVITY_COLUMNS = ("layer", "filters", "removed", "kept_fraction", "error")
"""Columns of the curves as a table."""


def sensitivity_rows(sensitivity: Sensitivity) -> list[dict[str, str | int | float]]:
    """Return sensitivity curves as a table in long form, a row for each number of removed filters.

    `pandas.DataFrame` takes it as it is.
    """
    return [
        dict(
            zip(
                SENSITIVITY_COLUMNS,
                (name, len(curve) - 1, removed, 1 - removed / (len(curve) - 1), float(error)),
                strict=True,
            )
        )
        for name, curve in sensitivity.items()
        for removed, error in enumerate(curve)
    ]


@dataclass(frozen=True)
class SizeTrial:
    """One attempt of the size search: a network of some size and its accuracy."""

    fraction_left: float
    """Fraction of the budget's quantity that the network keeps."""
    validation_metric: float
    kept: bool
    """Whether the accuracy is within the limit."""


@dataclass(frozen=True)
class PlanTrial:
    """One of several plans for the same budget, and what it came to."""

    depth_weight: float
    """How the plan weighs layers by depth (`PlanInputs.plan`)."""
    divergence: float
    """Mean divergence of the refitted network's outputs from the original's on held-out images."""


@dataclass(frozen=True)
class JointRefit:
    """What estimating the kernels around a group together achieved, on held-out images.

    The errors are squared ones of what the group's consumers put out, or of the residual sum that
    it goes into, over the variance of the original's.
    """

    group: str
    error_before: float
    """With the kernels of the layerwise refit."""
    error_after: float
    """The same as before if the kernels stayed."""


@dataclass(frozen=True)
class LayerRefit:
    """What the refit of one kernel achieved, on calibration images held out of the fit.

    Every fifth image is held out (`data.is_held_out`). Of fewer than five images none is: then
    errors are those on the images of the fit.
    """

    layer: str
    error_cut: float
    """Squared error over the variance of the regression targets, with the kernel as cut.

    If only a rectifier reads the layer's output, both errors are measured after the rectifier.
    """
    error_refit: float
    """The same with the re-estimated kernel."""
    ridge: float | None
    """The chosen ridge; None if the kernel was left as cut."""
    note: str = ""
    """Why the kernel was left as cut, if it was."""
    form: RefitForm = "patch"
    """The form of regression that estimated it."""
    joint: JointRefit | None = None
    """What it gained by being estimated together with the kernels that produce what it reads, if it
    was the last of them."""


@dataclass(frozen=True)
class RefitCheck:
    """Whether the refitted kernels beat those of the cut, on held-out calibration images.

    Divergences are mean KL divergences from the original network's outputs, in nats.
    """

    divergence_cut: float
    divergence_refit: float
    is_kept: bool
    """Whether the refitted kernels were kept; otherwise the network was left as cut."""


@dataclass(frozen=True)
class BatchNormRecalibration:
    """Which batch-norm statistics were re-estimated, and the effect on held-out images.

    Divergences are mean KL divergences from the original network's outputs, in nats.
    """

    statistics: BatchNormStatistics
    """The running means alone, or the variances as well."""
    fraction: float
    """How far the statistics moved from the old values (0) to the re-estimated ones (1)."""
    divergence_before: float
    divergence_after: float


@dataclass(frozen=True)
class RefitOutcome:
    """What was done to a network after its cut."""

    layers: tuple[LayerRefit, ...] = ()
    check: RefitCheck | None = None
    batchnorm: BatchNormRecalibration | None = None
