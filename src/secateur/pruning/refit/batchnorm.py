"""Batch-norm statistics, re-estimated where held-out images say that it helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.data import Batch
from secateur.evaluation.divergence import Logits, divergence_by_image, is_smaller, logits_of
from secateur.runtime import distributed
from secateur.runtime.module_state import evaluating

Statistics = Literal["means", "both"]
_MeanAndVariance = tuple[Tensor, Tensor]
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Parts of the way from the old statistics to the re-estimated ones that are tried."""


@dataclass(frozen=True)
class BatchNormRecalibration:
    """Which statistics of the batch norms were re-estimated, and what held-out images say of it.

    Divergences are mean KL divergences from the original network's answers, in nats.
    """

    statistics: Statistics
    """The running means alone, or the variances as well."""
    share: float
    """Part of the way from the old statistics to the re-estimated ones; 0: left as they were."""
    divergence_before: float
    divergence_after: float


def recalibrate_batchnorm(
    expected: Sequence[Logits],
    smaller: nn.Module,
    fit: Callable[[], Iterable[Batch]],
    held_out: Callable[[], Iterable[Batch]],
) -> BatchNormRecalibration | None:
    """Moves the statistics of the batch norms of `smaller` in place; what was chosen.

    They are re-estimated on the images of `fit`. All norms go the same part of the way, the one
    with the smallest divergence from the `expected` answers on the images of `held_out`;
    none of it, unless that is smaller than before, and by more than images differ in it
    (`has_fallen`): a few hundred images can't tell small gains from chance. No label is looked at.
    Of several processes each brings its share of the batches (`distributed.dealt`). None where
    `smaller` has no batch norm with running statistics.
    """
    norms = _norms(smaller)
    if not norms:
        return None
    before = divergence_by_image(expected, logits_of(smaller, held_out()))
    old = _statistics(norms)
    new = _reestimated(smaller, norms, fit())
    unchanged = float(before.mean())
    best = BatchNormRecalibration("both", 0.0, unchanged, unchanged)
    for statistics in ("means", "both"):
        for share in SHARES:
            _move(norms, old, new, statistics, share)
            found = divergence_by_image(expected, logits_of(smaller, held_out()))
            divergence = float(found.mean())
            if divergence < best.divergence_after and is_smaller(before, found):
                best = BatchNormRecalibration(statistics, share, unchanged, divergence)
    _move(norms, old, new, best.statistics, best.share)
    return best


def _norms(network: nn.Module) -> list[_BatchNorm]:
    """Batch norms with running statistics, but for those that only train on accelerators."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.running_mean is not None
    ]


def _buffers(norm: _BatchNorm) -> _MeanAndVariance:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _statistics(norms: Sequence[_BatchNorm]) -> list[_MeanAndVariance]:
    buffers = map(_buffers, norms)
    return [(mean.clone(), variance.clone()) for mean, variance in buffers]


def _reestimated(
    network: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Batch]
) -> list[_MeanAndVariance]:
    """Mean over all images of the statistics of their batches, each norm after those before it.

    The batches are those of all processes. The network is as it was afterwards.
    `torch.optim.swa_utils.update_bn` does the same in one process, but gives a smaller last batch
    the weight of a whole one and has dropout drop. A batch of one image is left out: it has no
    variance where a map has one position.
    """
    own: list[tuple[int, list[_MeanAndVariance]]] = []
    with _accumulating(network, norms):
        for norm in norms:
            norm.momentum = 1.0  # each batch's statistics take the place of those before
        for batch in batches:
            if len(batch.images) > 1:
                network(batch.images)
            own.append((len(batch.images), _statistics(norms)))
    counted = [each for each in distributed.gather_shards(own) if each[0] > 1]
    if not counted:
        return _statistics(norms)
    total = sum(count for count, _ in counted)
    mean = [(torch.zeros_like(m).double(), torch.zeros_like(v).double()) for m, v in counted[0][1]]
    for count, found in counted:
        for sums, pair in zip(mean, found, strict=True):
            for each, part in zip(sums, pair, strict=True):
                each += part.double() * (count / total)
    return [(m.float(), v.float()) for m, v in mean]


@contextlib.contextmanager
def _accumulating(network: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms take each batch's statistics in the block, and are as before after it."""
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
    norms: Sequence[_BatchNorm],
    old: Sequence[_MeanAndVariance],
    new: Sequence[_MeanAndVariance],
    statistics: Statistics,
    share: float,
) -> None:
    """Puts the norms a share of the way from the old statistics to the new ones."""
    shares = share, share if statistics == "both" else 0.0
    for norm, before, after in zip(norms, old, new, strict=True):
        for buffer, a, b, weight in zip(_buffers(norm), before, after, shares, strict=True):
            buffer.copy_(a.lerp(b, weight))
