"""Tell whether a divergence has fallen by more than chance explains."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

CONFIDENCE_SIGMAS = 2.0
"""The standard errors by which a mean must fall for the fall to be significant."""


def is_smaller(before: Float[Tensor, "image"], after: Float[Tensor, "image"]) -> bool:
    """Return whether the mean over images fell significantly; never true for a single image."""
    fall = before - after
    standard_error = float(fall.std()) / math.sqrt(len(fall)) if len(fall) > 1 else math.inf
    return float(fall.mean()) > CONFIDENCE_SIGMAS * standard_error
