"""How ways to prune stand to each other: means, spreads, and differences with their doubt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from secateur.experiments.compare.results import Row
from secateur.pipeline.result import Stage

CONFIDENCE = 0.95
Setting = tuple[str, str]
"""A network and a target."""
Verdict = Literal["better", "worse", "not significantly different", "one seed"]


@dataclass(frozen=True)
class Difference:
    """How much more top-1 than the baseline's, in points, over paired seeds."""

    mean: float
    low: float
    high: float
    """Ends of the interval that Student's t gives with `CONFIDENCE`; infinite for one seed."""
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """What the interval supports."""
        if self.seeds == 1:
            return "one seed"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not significantly different"


@dataclass(frozen=True, eq=False)
class BenchmarkStatistics:
    """Rows by what they are compared by."""

    settings: tuple[Setting, ...]
    methods: tuple[str, ...]
    """Criteria, with their variants."""
    baseline: str
    rows: Mapping[tuple[str, Setting], Mapping[int, Row]]
    """Of each way in each setting: by seed, those that are done."""
    failures: tuple[Row, ...]

    @property
    def step(self) -> float:
        """Points of top-1 that one image makes."""
        images = [row.images for row in self.all_rows if row.images]
        return 100 / min(images) if images else 0.0

    @property
    def all_rows(self) -> list[Row]:
        """Those that are done."""
        return [row for rows in self.rows.values() for row in rows.values()]

    @property
    def measured(self) -> tuple[Setting, ...]:
        """The settings in which any way came to an end; a target out of reach has none."""
        done = {setting for _, setting in self.rows}
        return tuple(setting for setting in self.settings if setting in done)

    def values(self, way: str, setting: Setting, stage: Stage | None = None) -> dict[int, float]:
        """Top-1 in % by seed, after a stage or at the end; only of seeds that came to it."""
        rows = self.rows.get((way, setting), {})
        found = {seed: row.percent(stage) for seed, row in rows.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def difference(self, way: str, setting: Setting) -> Difference | None:
        """To the baseline in a setting; None without seeds that both have."""
        one, other = (self.values(each, setting) for each in (way, self.baseline))
        return paired(one, other, self.step)

    def overall(self, way: str) -> Difference | None:
        """To the baseline, averaged over what is measured; seeds that lack a setting don't
        count."""
        one, other = (self._means(each) for each in (way, self.baseline))
        return paired(one, other, self.step / math.sqrt(len(self.measured) or 1))

    def _means(self, way: str) -> dict[int, float]:
        by_setting = [self.values(way, setting) for setting in self.measured]
        whole = set.intersection(*(set(values) for values in by_setting)) if by_setting else set()
        return {seed: statistics.mean(values[seed] for values in by_setting) for seed in whole}


def compute_statistics(rows: Sequence[Row], baseline: str) -> BenchmarkStatistics:
    """Sorts rows, in the order that they come in."""
    done: dict[tuple[str, Setting], dict[int, Row]] = {}
    for row in rows:
        if row.outcome == "done":
            done.setdefault((row.method, (row.network, row.target)), {})[row.seed] = row
    return BenchmarkStatistics(
        settings=tuple(dict.fromkeys((row.network, row.target) for row in rows)),
        methods=tuple(dict.fromkeys(row.method for row in rows)),
        baseline=baseline,
        rows=done,
        failures=tuple(row for row in rows if row.outcome == "failed"),
    )


def paired(
    one: Mapping[int, float], other: Mapping[int, float], step: float = 0.0
) -> Difference | None:
    """The mean of `one` less `other` over the keys that both have, with Student's interval.

    Both see the same images with the same seed, so what seeds have in common falls out of the
    differences. Values come in steps of `step`; the differences are taken to vary by at least what
    rounding to that varies, `step`² / 6, or else few seeds that happen to agree would be sure.
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not differences:
        return None
    mean, count = statistics.mean(differences), len(differences)
    if count == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    error = math.sqrt(max(statistics.variance(differences), step**2 / 6) / count)
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return Difference(mean, mean - reach, mean + reach, count)
