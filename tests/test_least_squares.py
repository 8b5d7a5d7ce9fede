"""Kernels from streamed rows are those of float64, from sums of products and from rows alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.pruning.refit.candidates import descend
from secateur.pruning.refit.least_squares import Gram, LeastSquares, Rows

GROUPS, INPUTS, OUTPUTS = 2, 12, 3


def problem(rows: int, mean: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `[group, row, input]` far from zero, targets and an old kernel, in float32."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(GROUPS, rows, INPUTS, generator=generator) + mean
    y = torch.randn(GROUPS, rows, OUTPUTS, generator=generator) - mean
    return x, y, torch.randn(GROUPS, OUTPUTS, INPUTS, generator=generator)


def reference(
    x: Tensor, y: Tensor, old: Tensor, ridge: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The solution in float64, from all rows at once."""
    x, y, old = x.double(), y.double(), old.double()
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    if bias is None:
        x, target = x - x_mean, y - y_mean
    else:
        target = y - bias[:, None]
    square = x.mT @ x / x.shape[1]
    strength = ridge * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    residual = x.mT @ (target - x @ old.mT) / x.shape[1]
    kernel = old + torch.linalg.solve(square + strength * torch.eye(INPUTS), residual).mT
    if bias is None:
        bias = (y_mean - x_mean @ kernel.mT)[:, 0]
    return kernel, bias


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("method", "rows"), [(Gram, 500), (Gram, 60), (Rows, 8), (Rows, 40)])
def test_blocks_in_float32_give_the_solution_of_float64(
    method: type[Gram] | type[Rows], rows: int, *, has_bias: bool
) -> None:
    x, y, old = problem(rows, mean=0.5 if has_bias else 100.0)
    bias = torch.full((GROUPS, OUTPUTS), 0.3, dtype=torch.float64) if has_bias else None
    sums: LeastSquares = method(old, bias)
    for x_block, y_block in zip(x.split(rows // 3, 1), y.split(rows // 3, 1), strict=True):
        sums.add(x_block, y_block)
    sums.add(x[:, :0], y[:, :0])
    sums.merge()
    for ridge in (1e-3, 1e-1):
        kernel, offset = sums.ridge(ridge)
        wanted, wanted_offset = reference(x, y, old, ridge, bias)
        torch.testing.assert_close(kernel, wanted, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(offset, wanted_offset, rtol=1e-4, atol=1e-2)
    renewed = sums.without_targets()
    renewed.add_targets(x, -y)
    renewed.merge_targets()
    wanted, _ = reference(x, -y, old, 1e-2, bias)
    torch.testing.assert_close(renewed.ridge(1e-2)[0], wanted, rtol=1e-4, atol=2e-5)
    wanted, _ = reference(x, y, old, 1e-2, bias)
    torch.testing.assert_close(sums.ridge(1e-2)[0], wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("errors", "tried"),
    [
        ([9, 8, 7, 6, 5, 4], [3, 2, 4, 5]),
        ([9, 8, 7, 6, 4, 5], [3, 2, 4, 5]),
        ([9, 8, 1, 2, 3, 4], [3, 2, 1]),
        ([1, 8, 9, 9, 9, 9], [3, 2, 1, 0]),
        ([9, 8, 7, 6, math.nan, 5], [3, 2, 4]),
        ([1], [0]),
        ([2, 1], [1, 0]),
    ],
)
def test_the_search_ends_where_the_error_rises(errors: list[float], tried: list[int]) -> None:
    order: list[int] = []

    def error_of(number: int) -> float:
        order.append(number)
        return errors[number]

    descend(len(errors), error_of)
    assert order == tried
