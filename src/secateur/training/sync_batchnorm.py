"""Synchronise batch norm: normalise by the statistics of a batch over all processes.

torch's `SyncBatchNorm` does so on accelerators only; this works on any device, by differentiable
sums over processes. Without it, results depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.runtime import distributed
from secateur.runtime.torch_internals import BatchNorm


@contextlib.contextmanager
def sync_batchnorm(model: nn.Module) -> Iterator[None]:
    """Make the batch norms of a network normalise by the batch of all processes within a block.

    This concerns training mode only. Whatever else a subclass of batch norm does, such as an
    activation, it still does. With one process nothing changes.
    """
    batchnorms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if distributed.rank_and_world_size()[1] == 1:
        yield
        return
    for norm in batchnorms:
        norm.forward = functools.partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in batchnorms:
            del norm.forward  # uncovers the class's method


def _forward(norm: BatchNorm, values: Tensor) -> Tensor:
    forward = type(norm).forward
    if not norm.training:  # processes may validate on different numbers of batches
        return forward(norm, values)
    with _SyncBatchNormMode():
        return forward(norm, values)


class _SyncBatchNormMode(TorchFunctionMode):
    """Replace `batch_norm` by one with the statistics of all processes, within a block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        function = _batch_norm if func is F.batch_norm else func
        return function(*args, **(kwargs or {}))


def _batch_norm(
    values: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Replace `torch.nn.functional.batch_norm`."""
    if not training:
        return F.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [axis for axis in range(values.dim()) if axis != 1]
    shape = [1, -1] + [1] * (values.dim() - 2)
    exact = values.float()
    counts = exact.new_tensor([exact.numel() / exact.shape[1]])
    sums: Tensor = differentiable.all_reduce(torch.cat([exact.sum(axes), counts]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = exact - mean.reshape(shape)
    squares: Tensor = differentiable.all_reduce(centred.square().sum(axes))
    variance = squares / count
    with torch.no_grad():  # the running variance is unbiased, as torch's
        if running_mean is not None:
            running_mean.lerp_(mean, momentum)
        if running_var is not None:
            running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
    normalised = centred * torch.rsqrt(variance + eps).reshape(shape)
    if weight is not None:
        normalised = normalised * weight.reshape(shape)
    if bias is not None:
        normalised = normalised + bias.reshape(shape)
    return normalised.to(values.dtype)
