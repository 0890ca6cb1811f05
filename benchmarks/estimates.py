"""Means, differences and their 95 % intervals, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy import stats


class Estimate(NamedTuple):
    """A mean or a difference of means, in percent or percentage points."""

    value: float
    half: float | None
    """Half of the 95 % interval; None where one seed leaves it unknown."""

    def text(self, sign: str = "") -> str:
        """Value and half-width."""
        half = "" if self.half is None else f" ± {self.half:.2f}"
        return f"{round(self.value, 2) + 0.0:{sign}.2f}{half}"  # no minus zero


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of percentages, with Student's interval."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(fmean(values), half)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean of the differences seed by seed, with Student's interval.

    It holds whether or not what a seed sets (order of the images, augmentation) makes both alike.
    """
    return mean_of([one - other for one, other in zip(values, others, strict=True)])


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The difference of two means of independent values, with Welch's interval."""
    value = fmean(values) - fmean(others)
    if min(len(values), len(others)) < 2:
        return Estimate(value, None)
    parts = [stdev(v) ** 2 / len(v) for v in (values, others)]
    if not sum(parts):
        return Estimate(value, 0.0)
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(v) - 1) for part, v in zip(parts, (values, others), strict=True)
    )
    return Estimate(value, stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts)))


def percent(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """An accuracy of every seed."""
    return [100 * record[key] for record in records]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
