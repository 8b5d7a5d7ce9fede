"""In which order filters are eliminated, and the error without 0, 1, … of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

RIDGE = 1e-3
"""Added to the diagonal of a covariance, as a multiple of its mean."""
ROUNDS = 128
"""Layers with more filters remove several at a time, so that there are about this many rounds."""


def eliminate(
    covariance: Float[Tensor, "value value"],
    consumers: Float[Tensor, "output value"],
    filters: int,
    norm_weights: Float[Tensor, "filter"] | None = None,
) -> list[int]:
    """Return the order in which filters are removed if each step removes the least missed.

    A filter has one value for each offset of a patch (`value = offset * filters + filter`). With W
    the consumers' weights, refitted to the remaining filters, and P the inverse covariance of
    those, removing filter s costs tr(W_s P_ss^-1 W_s'); then W loses W_s P_ss^-1 P_s, and P loses
    P_s' P_ss^-1 P_s. The filter with the smallest cost times its norm weight is removed, of equal
    ones the filter with the larger index.

    W' and P hold the remaining filters alone, the values of each side by side. The last filters
    move to the places of those removed, so nothing else is copied.
    """
    offsets = len(covariance) // filters
    weights = _by_filter(_fewest_rows(consumers.double()), filters).T
    weights = weights.clone(memory_format=torch.contiguous_format)
    inverse = _inverse(_by_filter(_by_filter(covariance, filters).T, filters))
    remaining = list(range(filters))  # the filter at each place
    order: list[int] = []
    at_a_time = max(1, filters // ROUNDS)
    while remaining:
        count = len(remaining)
        blocks = inverse.view(count, offsets, count, offsets).diagonal(dim1=0, dim2=2)
        carried = weights.view(count, offsets, -1)
        costs = (carried * torch.linalg.solve(blocks.movedim(-1, 0), carried)).sum((1, 2))
        votes = (costs if norm_weights is None else costs * norm_weights[remaining]).tolist()
        ranked = sorted(range(count), key=lambda place: (votes[place], -remaining[place]))
        removed = ranked[:at_a_time]
        order += [remaining[place] for place in removed]
        gone = _values_at(removed, offsets)
        rows, gone_weights = inverse[gone], weights[gone]
        passed = torch.linalg.solve(rows[:, gone], rows)
        left = count - len(removed)
        free = sorted(place for place in removed if place < left)
        moved = [place for place in range(left, count) if place not in removed]
        target, source = _values_at(free, offsets), _values_at(moved, offsets)
        for columns in (inverse, weights, inverse.T, rows.T, passed.T):
            columns[target] = columns[source]
        for place, origin in zip(free, moved, strict=True):
            remaining[place] = remaining[origin]
        del remaining[left:]
        size = left * offsets
        weights, inverse = weights[:size], inverse[:size, :size]
        weights.addmm_(passed[:, :size].T, gone_weights, alpha=-1)
        inverse.addmm_(rows[:, :size].T, passed[:, :size], alpha=-1)
    return order


def _by_filter(matrix: Tensor, filters: int) -> Tensor:
    """Return columns of `filter * offsets + offset` for those of `offset * filters + filter`."""
    by_filter: Tensor = matrix.unflatten(1, (-1, filters)).mT.flatten(1)
    return by_filter


def _values_at(places: Sequence[int], offsets: int) -> Int[Tensor, "value"]:
    """Return the values of the filters at some places, where each filter's lie side by side."""
    first = torch.tensor(places, dtype=torch.int64) * offsets
    return (first[:, None] + torch.arange(offsets)).flatten()


def _fewest_rows(consumers: Float[Tensor, "output value"]) -> Float[Tensor, "row value"]:
    """Return weights with the same products over outputs, of at most as many rows as values."""
    if len(consumers) <= consumers.shape[1]:
        return consumers
    factor: Tensor = torch.linalg.qr(consumers, mode="r").R
    return factor


def _inverse(covariance: Float[Tensor, "value value"]) -> Float[Tensor, "value value"]:
    """Return the inverse of a covariance with its ridge."""
    system = with_ridge(covariance)
    factor, failed = torch.linalg.cholesky_ex(system)
    # Where it fails, rounding outweighs a covariance of next to nothing.
    inverse: Tensor = torch.linalg.inv(system) if failed else torch.cholesky_inverse(factor)
    return inverse


def error_curve(
    covariance: Float[Tensor, "value value"],
    consumers: Float[Tensor, "output value"],
    ranking: Sequence[int],
    held_out: Float[Tensor, "value value"] | None = None,
) -> Float[Tensor, "count"]:
    """Return the consumers' summed squared error without 0, 1, … up to all filters.

    The last filter of `ranking` is removed first; values are laid out as for `eliminate`. With the
    filters in the order of `ranking` and L the Cholesky factor of their covariance, what the first
    filters can't predict of the rest r has the covariance L_rr L_rr'. So removing the filters from
    one on costs the squares of the columns of (consumers L) from that filter's on.

    These are errors on the images that the prediction is estimated from. With `held_out`, the
    covariance of other images about the means of the first ones, they are those on the others. The
    parts that can't be predicted then have the covariance L_rr Z_rr L_rr' with
    Z = L^-1 held_out L^-1', and not the identity in its place. Such errors may fall where one more
    filter goes; then it counts as no gain.
    """
    filters = len(ranking)
    order = torch.arange(len(covariance)).reshape(-1, filters).T[torch.tensor(ranking)].flatten()
    factor = torch.linalg.cholesky(with_ridge(covariance[order][:, order]))
    columns = _fewest_rows(consumers.double()[:, order]) @ factor
    if held_out is None:
        by_filter = columns.square().sum(0).reshape(filters, -1).sum(1)
        return torch.cat([by_filter.new_zeros(1), by_filter.flip(0).cumsum(0)])
    half = torch.linalg.solve_triangular(factor, held_out[order][:, order], upper=False)
    products = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    products *= columns.mT @ columns
    by_pair = products.reshape(filters, -1, filters, len(products) // filters).sum((1, 3))
    errors = by_pair.flip(0, 1).cumsum(0).cumsum(1).diagonal()
    return torch.cat([errors.new_zeros(1), errors]).cummax(0).values


def with_ridge(covariance: Tensor) -> Tensor:
    """Return a covariance with its ridge on the diagonal."""
    system = covariance.clone()
    system.diagonal().add_(_ridge(covariance))
    return system


def _ridge(covariance: Tensor) -> Tensor:
    """Return what is added to the diagonal of a covariance."""
    return RIDGE * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
