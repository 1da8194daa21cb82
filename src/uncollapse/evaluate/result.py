"""What a task reports, and the interval around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """One task's numbers. The first metric is the headline, and the interval belongs to it."""

    task: str
    metrics: dict[str, float]
    """Shares lie in [0, 1]; the name says what else a number is."""
    ci95: tuple[float, float]
    """Of the first metric: bootstrap over the n test images, or the spread over draws where there are draws."""
    n: int
    """Test images that the headline was measured on."""
    protocol: str
    """Its name and settings, such as ``weighted kNN, k = 20, temperature 0.07``."""
    source: str
    """The paper or code that it is from."""
    details: dict[str, Any] = field(default_factory=dict)
    """JSON-ready extras: what was chosen, per-class numbers, rules that were applied."""
    ci95_of: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Intervals of other metrics, by name; counts, and means over clusters that no resample leaves alone, have none."""

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics,
            "ci95": list(self.ci95),
            **({"ci95_of": {name: list(ends) for name, ends in self.ci95_of.items()}} if self.ci95_of else {}),
            "n": self.n,
            "protocol": self.protocol,
            "source": self.source,
            **({"details": self.details} if self.details else {}),
        }


def bootstrap95(
    statistic: Callable[[np.ndarray], float], n: int, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of ``statistic(indices)`` over resamples of n test images, with replacement.

    Covers the choice of test images only: not training seeds, not the choice of training images.

    Args:
        statistic: takes (n,) int64 indices into the test set; NaN for a resample it is not defined on.
        n: test images, at least 1.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])
    return _percentiles(values)


def bootstrap95_mean(values: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """`bootstrap95` of the mean of per-image values (n,), such as 0/1 for right, in one product of counts."""
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    n = len(values)
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) <= 64:  # few distinct values: how often each is drawn is multinomial
        means = rng.multinomial(n, counts / n, size=draws) @ levels / n
    else:
        means = np.array([values[rng.integers(0, n, n)].mean() for _ in range(draws)])
    return _percentiles(means)


def bootstrap95_class_means(
    values: np.ndarray, classes: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap95` of the mean over classes of the means of per-image values: macro accuracy, for one.

    Every resample has its own class sizes; a class that it misses is left out of its mean.

    Args:
        values: (n,), such as 0/1 for right. classes: (n,) int64, of each image.
    """
    rng = np.random.default_rng(seed)
    values, (_, codes) = np.asarray(values, dtype=np.float64), np.unique(classes, return_inverse=True)
    n, many = len(values), int(codes.max()) + 1
    levels, level = np.unique(values, return_inverse=True)
    if len(levels) <= 2:  # how often each cell of class and value is drawn is multinomial
        cells = np.bincount(codes * len(levels) + level, minlength=many * len(levels))
        counts = rng.multinomial(n, cells / n, size=draws).reshape(draws, many, len(levels))
        sizes, sums = counts.sum(2), counts @ levels
    else:
        picks = (rng.integers(0, n, n) for _ in range(draws))
        both = [(np.bincount(codes[i], minlength=many), np.bincount(codes[i], values[i], many)) for i in picks]
        sizes, sums = (np.array(x) for x in zip(*both, strict=True))
    with np.errstate(invalid="ignore"):
        return _percentiles(np.nanmean(sums / sizes, axis=1))


def spread95(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean over independent draws; (nan, nan) with fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    from scipy.stats import t

    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
