"""Criteria that need no images: chance, and the size of the kernels."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.criteria import Kernels, Sight


class Random:
    """A random order, the same for the same seed and group."""

    needs_images = False
    needs_gradients = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def observe(self, sight: Sight) -> None:
        """Not called."""

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """Uniform random numbers."""
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(group.encode()))
        return torch.rand(len(kernels.outgoing_norm), generator=generator, dtype=torch.float64)


class KernelNorm:
    """The norm of a filter's own kernel, meant over the kernels that write its channel.

    p = 1: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1. p = 2: its
    common variant.
    """

    needs_images = False
    needs_gradients = False

    def __init__(self, p: int) -> None:
        self._p = p

    def observe(self, sight: Sight) -> None:
        """Not called."""

    def score(self, group: str, kernels: Kernels) -> Float[Tensor, "filter"]:
        """The norms."""
        channels = 1 + max(int(rows.max()) for _, rows in kernels.incoming)
        total = torch.zeros(channels, dtype=torch.float64)
        count = torch.zeros(channels, dtype=torch.float64)
        for kernel, rows in kernels.incoming:
            norms = kernel.double().flatten(1).norm(p=self._p, dim=1).cpu()
            total.index_add_(0, rows, norms)
            count.index_add_(0, rows, torch.ones_like(norms))
        return (total / count.clamp_min(1))[kernels.channel]
