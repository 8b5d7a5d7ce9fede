"""Criteria that need the gradient of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from secateur.scoring.criteria import FeatureBatch, Kernels, Need
from secateur.scoring.exact_sum import ExactSum


class Taylor:
    """First-order change of the loss when a filter is silenced, squared and summed over images.

    (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8, at the
    feature map: the sum over positions of activation times gradient.)
    """

    needs: frozenset[Need] = frozenset({"maps", "gradients"})

    def __init__(self) -> None:
        self._sums: dict[str, ExactSum] = {}

    def reset(self, parts: Mapping[str, Kernels]) -> None:
        """Makes room for a sum a filter."""
        self._sums = {part: ExactSum((kernels.filters,)) for part, kernels in parts.items()}

    def update(self, sight: FeatureBatch) -> None:
        """Adds up the squares of a batch."""
        assert sight.gradients is not None
        change = (sight.maps.float() * sight.gradients.float()).sum(dim=(2, 3))  # [image, filter]
        self._sums[sight.tap].update(change.double().square())

    def state(self) -> Iterable[Tensor]:
        """See `Observer.state`."""
        return (total.limbs for total in self._sums.values())

    def compute(self, part: str) -> Float[Tensor, "filter"]:
        """The summed squares."""
        return self._sums[part].compute()
