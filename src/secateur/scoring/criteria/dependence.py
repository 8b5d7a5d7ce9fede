"""How far the filters of a layer differ from one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.graph.patches import even_step
from secateur.scoring.covariance import SecondMoments, quantize, quantization_unit
from secateur.scoring.criteria import FeatureBatch, Kernels, Need

POSITIONS = 64
"""Positions that are taken from each map, evenly spaced."""
STEP = 0.5
"""Between two nodes of the integral, in the logarithm: its error falls as exp(-2 pi^2 / STEP)."""
REACH = 60.0
"""Of the nodes, to either side of the largest eigenvalue; beyond is exp(-REACH / 2) of its root."""


class ChannelIndependence:
    """How much the nuclear norm of all feature maps shrinks without the filter.

    (Channel independence, CHIP, Sui et al., NeurIPS 2021. There the rows of one image's maps make
    up the matrix and the norms are averaged over images; here the matrix has all sampled positions
    of the calibration set, so that its second moments are all that is kept.)
    """

    needs: frozenset[Need] = frozenset({"maps", "usual"})

    def __init__(self) -> None:
        self._moments: dict[str, SecondMoments] = {}
        self._units: dict[str, Tensor] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the moments."""
        self._moments = {part: SecondMoments(kernels.filters) for part, kernels in parts.items()}

    def update(self, sight: FeatureBatch) -> None:
        """Adds up products."""
        assert sight.statistics is not None
        if sight.tap not in self._units:
            self._units[sight.tap] = quantization_unit(sight.statistics)
        step = even_step(sight.maps.shape[2], sight.maps.shape[3], POSITIONS)
        rows = sight.maps.flatten(2)[:, :, ::step].movedim(1, -1).flatten(0, 1)
        self._moments[sight.tap].update(quantize(rows, self._units[sight.tap], sight.tap))

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (tally for moments in self._moments.values() for tally in moments.state())

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The differences of the norms, divided by the root of the number of positions."""
        return nuclear_norm_losses(self._moments[part].raw(self._units[part]))


def nuclear_norm_losses(moments: Float[Tensor, "filter filter"]) -> Float[Tensor, "filter"]:
    """By how much the nuclear norm of A falls if a row is left out, for each row; `moments` is AA'.

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
    shares = weights @ (values[:, None] * resolvents.square()) / (weights @ resolvents)
    losses: Tensor = (shares * shifts.sqrt()).sum(1) * largest.sqrt() * (STEP / math.pi)
    return losses
