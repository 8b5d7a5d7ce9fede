"""Batch norms that take the statistics of a batch over all processes.

torch's `SyncBatchNorm` does so on accelerators only; this does the same with differentiable sums
over processes, on any device. Without it the size of a process's share changes what is learnt.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed.nn.functional as across
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from secateur.runtime import distributed


@contextlib.contextmanager
def sync_batchnorm(model: nn.Module) -> Iterator[None]:
    """Within the block the batch norms of `model` normalise by the batch of all processes.

    Only where they would normalise by their own batch, that is, in training mode. What else a norm
    of its own class does, such as an activation behind it, stays. With one process nothing is
    changed.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if distributed.rank_and_world_size()[1] == 1:
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
    own = type(norm).forward
    if not norm.training:  # processes may validate on different numbers of batches
        return own(norm, values)
    with _SyncBatchNormMode():
        return own(norm, values)


class _SyncBatchNormMode(TorchFunctionMode):
    """Within the block `batch_norm` in training takes the statistics of all processes."""

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
    """As `torch.nn.functional.batch_norm`, whose arguments it takes."""
    if not training:
        return F.batch_norm(values, running_mean, running_var, weight, bias, False, momentum, eps)
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
