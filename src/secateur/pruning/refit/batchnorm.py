"""Re-estimate batch-norm statistics, and keep the change only if held-out images gain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from secateur.data import Batch
from secateur.graph.module_state import evaluating
from secateur.pruning.outcome import BatchNormRecalibration, BatchNormStatistics
from secateur.pruning.refit.significance import is_smaller
from secateur.runtime import distributed
from secateur.runtime.torch_internals import BatchNorm

_MeanAndVariance = tuple[Tensor, Tensor]
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Fractions of the way from the old statistics to the re-estimated ones that are tried."""


def recalibrate_batchnorm(
    smaller: nn.Module,
    fit: Callable[[], Iterable[Batch]],
    divergence_of: Callable[[nn.Module], Tensor],
    before: Tensor | None = None,
) -> BatchNormRecalibration | None:
    """Move the batch-norm statistics of `smaller` in place, and return how far.

    The new statistics are estimated on the images of `fit`. All norms move by the same fraction of
    the way, the one with the smallest divergence; larger fractions are tried as long as it falls.
    `divergence_of(network)` returns that of each held-out image from the expected outputs
    (`divergence.DivergenceFrom`), and `before` is what it returns for `smaller` as it is, if that
    is known. The norms don't move unless it falls by more than chance explains
    (`significance.is_smaller`), since a few hundred images can't tell small gains from noise. No
    label is used.

    With several processes each passes its shard of the batches (`distributed.shard`). Returns None
    if `smaller` has no batch norm with running statistics.
    """
    norms = _norms(smaller)
    if not norms:
        return None
    old = _statistics(norms)
    before = divergence_of(smaller) if before is None else before
    new = _reestimated(smaller, norms, fit())
    unchanged = float(before.mean())
    best = BatchNormRecalibration("both", 0.0, unchanged, unchanged)
    kinds: tuple[BatchNormStatistics, ...] = ("means", "both")
    for statistics in kinds:
        divergence = unchanged
        for fraction in FRACTIONS:
            _move(norms, old, new, statistics, fraction)
            after = divergence_of(smaller)
            last, divergence = divergence, float(after.mean())
            if not divergence < last:
                break
            if divergence < best.divergence_after and is_smaller(before, after):
                best = BatchNormRecalibration(statistics, fraction, unchanged, divergence)
    _move(norms, old, new, best.statistics, best.fraction)
    return best


def _norms(network: nn.Module) -> list[BatchNorm]:
    """Return batch norms with running statistics, except sync batch norms."""
    return [
        module
        for module in network.modules()
        if isinstance(module, BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.running_mean is not None
    ]


def _buffers(norm: BatchNorm) -> _MeanAndVariance:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _statistics(norms: Sequence[BatchNorm]) -> list[_MeanAndVariance]:
    """Return copies of the norms' statistics on the CPU."""
    buffers = map(_buffers, norms)
    return [(mean.cpu().clone(), variance.cpu().clone()) for mean, variance in buffers]


def _reestimated(
    network: nn.Module, norms: Sequence[BatchNorm], batches: Iterable[Batch]
) -> list[_MeanAndVariance]:
    """Return the mean statistics of all batches, weighted by their number of images.

    The batches are those of all processes; the network is left as it was. This differs from
    `torch.optim.swa_utils.update_bn`, which gives a smaller last batch full weight, keeps dropout
    active and knows one process only. Batches of one image are skipped: they have no variance if
    maps have one position.
    """
    shard: list[tuple[int, list[_MeanAndVariance]]] = []
    with _accumulating(network, norms):
        for norm in norms:
            norm.momentum = 1.0  # each batch's statistics replace those before
        for batch in batches:
            if len(batch.images) > 1:
                network(batch.images)
            shard.append((len(batch.images), _statistics(norms)))
    counted = [entry for entry in distributed.gather_shards(shard) if entry[0] > 1]
    if not counted:
        return _statistics(norms)
    total = sum(count for count, _ in counted)
    mean = [(torch.zeros_like(m).double(), torch.zeros_like(v).double()) for m, v in counted[0][1]]
    for count, statistics in counted:
        for sums, pair in zip(mean, statistics, strict=True):
            for accumulator, value in zip(sums, pair, strict=True):
                accumulator += value.double() * (count / total)
    return [(m.float(), v.float()) for m, v in mean]


@contextlib.contextmanager
def _accumulating(network: nn.Module, norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Let batch norms record each batch's statistics in the block, and restore them after it."""
    states = [{k: t.clone() for k, t in norm.named_buffers(recurse=False)} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with evaluating(network), torch.inference_mode():
        for norm in norms:
            norm.train()
        try:
            yield
        finally:
            for norm, state, momentum in zip(norms, states, momenta, strict=True):
                norm.momentum = momentum
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(state[name])


def _move(
    norms: Sequence[BatchNorm],
    old: Sequence[_MeanAndVariance],
    new: Sequence[_MeanAndVariance],
    statistics: BatchNormStatistics,
    fraction: float,
) -> None:
    """Move the norms by a fraction of the way from the old statistics to the new ones."""
    weights = fraction, fraction if statistics == "both" else 0.0
    for norm, before, after in zip(norms, old, new, strict=True):
        for buffer, a, b, weight in zip(_buffers(norm), before, after, weights, strict=True):
            buffer.copy_(a.lerp(b, weight))
