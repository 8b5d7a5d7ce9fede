"""Statistics of a benchmark: means, spreads, and differences with confidence intervals."""

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
Verdict = Literal["better", "worse", "not significant", "one seed"]


@dataclass(frozen=True)
class Difference:
    """Top-1 of a method less that of the baseline, in points, over paired seeds."""

    mean: float
    low: float
    high: float
    """Ends of the `CONFIDENCE` interval by Student's t; infinite for one seed."""
    seeds: int

    @property
    def verdict(self) -> Verdict:
        """What the interval supports."""
        if self.seeds == 1:
            return "one seed"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not significant"


@dataclass(frozen=True, eq=False)
class BenchmarkStatistics:
    """Rows by method, setting and seed."""

    settings: tuple[Setting, ...]
    methods: tuple[str, ...]
    """Criteria, with their variants."""
    baseline: str
    rows: Mapping[tuple[str, Setting], Mapping[int, Row]]
    """Rows of finished jobs by seed, for each method and setting."""
    failures: tuple[Row, ...]

    @property
    def step(self) -> float:
        """Top-1 of one image, in points."""
        images = [row.images for row in self.all_rows if row.images]
        return 100 / min(images) if images else 0.0

    @property
    def all_rows(self) -> list[Row]:
        """Rows of finished jobs."""
        return [row for rows in self.rows.values() for row in rows.values()]

    @property
    def measured(self) -> tuple[Setting, ...]:
        """Settings in which at least one job finished; a target out of reach has none."""
        measured = {setting for _, setting in self.rows}
        return tuple(setting for setting in self.settings if setting in measured)

    def values(self, method: str, setting: Setting, stage: Stage | None = None) -> dict[int, float]:
        """Return top-1 in % by seed after a stage, by default the last; without missing values."""
        rows = self.rows.get((method, setting), {})
        percents = {seed: row.percent(stage) for seed, row in rows.items()}
        return {seed: percent for seed, percent in percents.items() if percent is not None}

    def difference(self, method: str, setting: Setting) -> Difference | None:
        """Return the difference to the baseline in a setting; None without common seeds."""
        return paired(self.values(method, setting), self.values(self.baseline, setting), self.step)

    def overall(self, method: str) -> Difference | None:
        """Return the difference to the baseline, averaged over the measured settings.

        Seeds that lack a setting don't count.
        """
        step = self.step / math.sqrt(len(self.measured) or 1)
        return paired(self.means(method), self.means(self.baseline), step)

    def means(self, method: str) -> dict[int, float]:
        """Return the mean top-1 in % over the measured settings, by seed; without partial ones."""
        by_setting = [self.values(method, setting) for setting in self.measured]
        seeds = set.intersection(*(set(values) for values in by_setting)) if by_setting else set()
        return {seed: statistics.mean(values[seed] for values in by_setting) for seed in seeds}


def compute_statistics(rows: Sequence[Row], baseline: str) -> BenchmarkStatistics:
    """Return the statistics of rows; settings and methods keep the order of the rows."""
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
    """Return the mean of `one` less `other` over their common seeds, with Student's interval.

    With the same seed, both see the same images, so the effects that a seed has on both cancel.

    Args:
        one: Values by seed.
        other: Values by seed.
        step: Resolution of the values. The variance of the differences is taken to be at least
            that of rounding, `step`² / 6; otherwise a few seeds that happen to agree would give
            an interval of no width.

    Returns:
        None if no seed is in both.
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
