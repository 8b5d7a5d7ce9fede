"""Criterion `chip`: how far the filters of a layer depend on one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.graph.patches import even_step
from secateur.graph.taps import Kernels
from secateur.scoring.covariance import SecondMoments, quantization_unit, quantize
from secateur.scoring.criteria import FeatureBatch, Need

POSITIONS = 64
"""Positions sampled from each map, evenly spaced."""
STEP = 0.5
"""Distance of the integral's nodes, in log t: its error falls as exp(-2 pi^2 / STEP)."""
REACH = 60.0
"""Range of the nodes in log t, to either side of the largest eigenvalue; what lies beyond is
exp(-REACH / 2) of its root."""


class ChannelIndependence:
    """How much the nuclear norm of all feature maps shrinks without the filter.

    Channel independence (CHIP, Sui et al., NeurIPS 2021). In the paper one image's maps make up the
    matrix and the norms are averaged over images; here the matrix has all sampled positions of the
    calibration set, so that its second moments suffice.
    """

    needs: frozenset[Need] = frozenset({"maps", "statistics"})

    def __init__(self) -> None:
        self._moments: dict[str, SecondMoments] = {}
        self._units: dict[str, Tensor] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._moments = {
            tap: SecondMoments(kernels.filters, kernels.device) for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> None:
        """Add the products of a batch's sampled positions."""
        assert features.statistics is not None
        if features.tap not in self._units:
            self._units[features.tap] = quantization_unit(features.statistics)
        step = even_step(features.maps.shape[2], features.maps.shape[3], POSITIONS)
        rows = features.maps.flatten(2)[:, :, ::step].movedim(1, -1).flatten(0, 1)
        self._moments[features.tap].update(quantize(rows, self._units[features.tap], features.tap))

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (tensor for moments in self._moments.values() for tensor in moments.state())

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the losses of the norm, divided by the root of the number of positions."""
        return nuclear_norm_losses(self._moments[tap].raw(self._units[tap])).cpu()


def nuclear_norm_losses(moments: Float[Tensor, "filter filter"]) -> Float[Tensor, "filter"]:
    """Return how much the nuclear norm of A falls without each row; `moments` is AA'.

    With w and u the eigenvalues and eigenvectors of AA', and AA' without row and column i on the
    other side, sqrt(x) = 1/pi int x / (x + t) dt / sqrt(t) turns the sums of roots into traces of
    resolvents, whose difference is that of a Schur complement: the loss is

        1/pi int_0^inf  sum_k u_ik^2 w_k / (w_k + t)^2  /  sum_k u_ik^2 / (w_k + t)  dt / sqrt(t)

    All terms are positive, so that nothing cancels, and equal or missing eigenvalues do no harm. In
    log t the trapezoidal rule converges geometrically (Trefethen and Weideman, SIAM Review 2014).
    Eigenvalues below the rounding of the largest one count as zero.
    """
    values, vectors = torch.linalg.eigh(moments)
    largest = values[-1]
    if float(largest) <= 0:
        return torch.zeros_like(values)
    values = values / largest
    values = values.where(values > len(values) * torch.finfo(torch.float64).eps, 0.0)
    weights = vectors.square()  # [filter, eigenvalue]
    nodes = torch.arange(-REACH, REACH + STEP, STEP, dtype=torch.float64, device=values.device)
    shifts = nodes.exp()
    resolvents = 1 / (values[:, None] + shifts)  # [eigenvalue, node]
    integrand = weights @ (values[:, None] * resolvents.square()) / (weights @ resolvents)
    losses: Tensor = (integrand * shifts.sqrt()).sum(1) * largest.sqrt() * (STEP / math.pi)
    return losses
