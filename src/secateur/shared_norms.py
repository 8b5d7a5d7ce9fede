"""Batch norms that take the statistics of a batch over all processes.

torch's `SyncBatchNorm` does so on accelerators only; this does the same with differentiable sums
over processes, on any device. Without it the size of a process's share changes what is learnt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed.nn.functional as across
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur import distributed


@contextlib.contextmanager
def sharing_norms(model: nn.Module) -> Iterator[None]:
    """Within the block the batch norms of `model` normalise by the batch of all processes.

    Only where they would normalise by their own batch, that is, in training mode. With one process
    nothing is changed.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if distributed.share()[1] == 1:
        yield
        return
    for norm in norms:
        norm.forward = functools.partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # the class's own is seen again


def _forward(norm: _BatchNorm, values: Tensor) -> Tensor:
    if not norm.training:  # processes may validate on different numbers of batches
        return type(norm).forward(norm, values)
    axes = [axis for axis in range(values.dim()) if axis != 1]
    shape = [1, -1] + [1] * (values.dim() - 2)
    exact = values.float()
    counts = exact.new_tensor([exact.numel() / exact.shape[1]])
    sums: Tensor = across.all_reduce(torch.cat([exact.sum(axes), counts]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = exact - mean.reshape(shape)
    squares: Tensor = across.all_reduce(centred.square().sum(axes))
    variance = squares / count
    _follow(norm, mean.detach(), variance.detach(), float(count))
    normalised = centred * torch.rsqrt(variance + norm.eps).reshape(shape)
    if norm.affine:
        normalised = normalised * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return normalised.to(values.dtype)


@torch.no_grad()
def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: float) -> None:
    """Moves the running statistics as torch does: by the unbiased variance."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * count / max(1.0, count - 1), momentum)
