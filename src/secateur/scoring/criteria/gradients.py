"""Criterion `taylor`, which needs the gradient of the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from secateur.graph.taps import Kernels
from secateur.scoring.criteria import FeatureBatch, Need
from secateur.scoring.exact_sum import ExactSum


class Taylor:
    """First-order change of the loss when a filter is masked, squared and summed over images.

    Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8, at the
    feature map: the sum over positions of activation times gradient.
    """

    needs: frozenset[Need] = frozenset({"maps", "gradients"})

    def __init__(self) -> None:
        self._sums: dict[str, ExactSum] = {}

    def reset(self, taps: Mapping[str, Kernels]) -> None:
        """Start anew; see `Observer.reset`."""
        self._sums = {
            tap: ExactSum((kernels.filters,), kernels.device) for tap, kernels in taps.items()
        }

    def update(self, features: FeatureBatch) -> None:
        """Add the squared changes of a batch's images."""
        assert features.gradients is not None
        change = (features.maps.float() * features.gradients.float()).sum(
            dim=(2, 3)
        )  # [image, filter]
        self._sums[features.tap].update(change.double().square())

    def state(self) -> Iterable[Tensor]:
        """Return the sums over images; see `Observer.state`."""
        return (total.limbs for total in self._sums.values())

    def compute(self, tap: str) -> Float[Tensor, "filter"]:
        """Return the summed squares."""
        return self._sums[tap].compute()
