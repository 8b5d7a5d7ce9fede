"""How far the filters of a layer differ from one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.criteria import Kernels, Need, Sight
from secateur.second_moments import SecondMoments

BISECTIONS = 50
ROOTS_AT_A_TIME = 2**24
"""Terms of the secular equation that are held at once."""


class ChannelIndependence:
    """How much the nuclear norm of all feature maps shrinks without the filter.

    (CHIP, Sui et al., NeurIPS 2021, eq. 4. There the rows of one image's maps make up the matrix
    and the norms are meant over images; here the matrix has all sampled positions of the probe set,
    so that its second moments are all that is kept.)
    """

    needs: frozenset[Need] = frozenset({"maps"})

    def __init__(self) -> None:
        self._moments: dict[str, SecondMoments] = {}

    def begin(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for the moments."""
        self._moments = {part: SecondMoments(kernels.filters) for part, kernels in parts.items()}

    def observe(self, sight: Sight) -> None:
        """Adds up products."""
        self._moments[sight.part].add(sight.maps)

    def tallies(self) -> Iterable[Tensor]:
        """See `Observer.tallies`."""
        return (tally for moments in self._moments.values() for tally in moments.tallies())

    def score(self, part: str) -> Float[Tensor, "filter"]:
        """The differences of the norms, divided by the root of the number of positions."""
        return nuclear_norm_losses(self._moments[part].raw)


def nuclear_norm_losses(moments: Float[Tensor, "filter filter"]) -> Float[Tensor, "filter"]:
    """By how much the nuclear norm of A falls if a row is left out, for each row; `moments` is AA'.

    The eigenvalues of AA' without row and column i are the roots of sum_k u_ik^2 / (w_k - x) = 0,
    with u and w the eigenvectors and eigenvalues of AA'; one lies between each two neighbouring w
    (Golub, SIAM Review 1973, section 5). They are found by bisection, all at once.
    """
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(0)
    whole = values.sqrt().sum()
    weights = vectors.square()  # [filter, eigenvalue]
    losses = torch.empty(len(moments), dtype=torch.float64)
    step = max(1, ROOTS_AT_A_TIME // len(moments) ** 2)
    for rows in torch.arange(len(moments)).split(step):
        low = values[:-1].expand(len(rows), -1).clone()
        high = values[1:].expand(len(rows), -1).clone()
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            gaps = values - middle[..., None]  # [row, root, eigenvalue]
            terms = weights[rows][:, None, :] / gaps.where(gaps != 0, torch.inf)
            is_below = terms.sum(2) < 0  # the sum rises from -inf to inf between two eigenvalues
            low = middle.where(is_below, low)
            high = high.where(is_below, middle)
        losses[rows] = whole - ((low + high) / 2).sqrt().sum(1)
    return losses
