"""Criteria that need the gradient of the loss."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.criteria import Kernels, Sight


class Taylor:
    """First-order change of the loss when a filter is silenced, squared and summed over images.

    (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8, at the
    feature map: the sum over positions of activation times gradient.)
    """

    needs_images = True
    needs_gradients = True

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}

    def observe(self, sight: Sight) -> None:
        """Adds up the squares of a batch."""
        assert sight.gradients is not None
        change = (sight.maps * sight.gradients).sum(dim=(2, 3)).double()  # [image, filter]
        zero = torch.zeros(change.shape[1], dtype=torch.float64)
        self._sum[sight.group] = self._sum.get(sight.group, zero) + change.square().sum(0).cpu()

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """The summed squares."""
        return self._sum[group]
