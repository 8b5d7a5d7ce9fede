"""Budgets: how much of a quantity may stay, and the ways to write that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, SupportsFloat, cast, get_args

from secateur.runtime.errors import TargetError

Quantity = Literal["macs", "params", "filters", "memory", "latency"]


@dataclass(frozen=True)
class Budget:
    """How much of a quantity the pruned network may use: `macs=0.7` is at most 70 % of the MACs."""

    quantity: Quantity
    fraction_left: float

    def __str__(self) -> str:
        return f"{self.quantity}={self.fraction_left}"


BudgetLike = Budget | str | float | Mapping[str, float | str]
"""A budget, or what `parse_budget` takes for one."""


def parse_budget(target: BudgetLike) -> Budget:
    """Return the budget that `macs=0.7`, `macs=70%`, `70%`, 0.7 or `{"macs": 0.7}` names.

    The number is the fraction to keep, of the MACs if no quantity is named.

    Raises:
        TargetError: the target names no quantity, several, or a fraction outside of 0 < F <= 1.
    """
    *names, last = (f"{name}=F" for name in get_args(Quantity))
    expected = f"give {', '.join(names)} or {last} with the fraction F to keep, 0 < F <= 1"
    if isinstance(target, Mapping) and len(target) == 1:
        quantity, number = next(iter(target.items()))
    elif isinstance(target, Mapping):
        raise TargetError(f"target {dict(target)} must name one quantity: {expected}")
    elif isinstance(target, Budget):
        quantity, number = target.quantity, target.fraction_left
    elif isinstance(target, str) and "=" in target:
        quantity, _, number = target.partition("=")
    else:
        quantity, number = "macs", target
    quantity = quantity.strip() if isinstance(quantity, str) else quantity
    if quantity not in get_args(Quantity):
        raise TargetError(f"target {target!r} is not understood: {expected}")
    fraction = _fraction(number)
    if fraction is None:
        what = "is not understood" if number is target else "has no number"
        raise TargetError(f"target {target!r} {what}: {expected}")
    if not 0 < fraction <= 1:
        raise TargetError(f"target {target!r} is out of range: {expected}{_meant(fraction)}")
    return Budget(cast(Quantity, quantity), fraction)


def _fraction(number: object) -> float | None:
    """Return the fraction that a number or a text such as 0.7 or 70% stands for, if it is one."""
    if isinstance(number, bool) or not isinstance(number, str | SupportsFloat):
        return None
    text = number.strip() if isinstance(number, str) else number
    try:
        if isinstance(text, str) and text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text)
    except (ValueError, TypeError, RuntimeError):
        return None


def _meant(fraction: float) -> str:
    """Return the fraction that a number of percent stands for, as a hint."""
    return f"; {fraction:g} % is {fraction / 100:g}" if 2 <= fraction <= 100 else ""
