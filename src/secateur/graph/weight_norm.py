"""Weight norm, whose kernels are computed as g · v / ‖v‖: which there are, and how they are cut.

The norm of a kernel changes when it loses inputs. So g and v are set anew after a cut, to the norm
and the values of what remains of the kernel, as `torch.nn.utils` does when weight norm is applied.

Source: Salimans & Kingma 2016, arXiv 1602.07868, equation 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.graph.network_graph import Tensors


@dataclass(frozen=True)
class WeightNorm:
    """A kernel with weight norm."""

    direction: str
    """Name of v."""
    magnitude: str
    """Name of g."""
    dim: int
    """Dimension whose indices have a norm each; -1 if the whole kernel has one."""

    def kernel(self, state: Tensors) -> Tensor:
        """Return g · v / ‖v‖."""
        direction = state[self.direction]
        return direction * (state[self.magnitude] / self.norm(direction))

    def norm(self, kernel: Tensor) -> Tensor:
        """Return the norm of a kernel, in the shape of g."""
        return torch.norm_except_dim(kernel, 2, self.dim)

    def parts(self, kernel: Tensor) -> dict[str, Tensor]:
        """Return v and g by name, from which a kernel is computed: the kernel and its norm.

        Where the norm is zero v is not, since it is divided by.
        """
        norm = self.norm(kernel)
        direction = kernel.where(norm != 0, torch.finfo(kernel.dtype).eps)
        return {self.direction: direction, self.magnitude: norm}


def with_kernels(norms: Iterable[WeightNorm], state: Tensors) -> dict[str, Tensor]:
    """Return a state that computes the same, in which each v is the kernel itself."""
    result = dict(state)
    for norm in norms:
        result.update(norm.parts(norm.kernel(state)))
    return result
