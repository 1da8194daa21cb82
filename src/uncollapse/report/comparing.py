"""Numbers over the seeds of an arm, and differences between arms over the same held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uncollapse.measure.catalogue import MERIT, Measure, number
from uncollapse.run_folder.read import RunRecord

LIMIT = 1.96
"""Standard errors of a difference beyond which it is called one."""


@dataclass(frozen=True)
class Stat:
    """A number over the seeds of an arm."""

    mean: float
    sd: float | None
    """Over seeds; None with one seed."""
    error: float | None
    """Standard error over held-out images and seeds; None where a single run has none."""
    interval: tuple[float, float] | None = None
    """The 95 % interval over held-out images that the runs give, in the measure's unit."""


def stat(measure: Measure, runs: Sequence[RunRecord]) -> Stat | None:
    """Mean, standard deviation and standard error of a measure over an arm's seeds; None where no run has it."""
    values = [value for run in runs if (value := measure.read(run.summary)) is not None]
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    errors = [e for run in runs if measure.error is not None and (e := measure.error(run.summary)) is not None]
    # The seeds share their held-out images, so averaging over seeds does not shrink that part.
    error = math.hypot(float(np.mean(errors)), (sd or 0.0) / math.sqrt(len(values))) if errors else None
    ends = [pair for run in runs if measure.interval and (pair := _ends(run, measure.interval)) is not None]
    interval = (float(np.mean([e[0] for e in ends])), float(np.mean([e[1] for e in ends]))) if ends else None
    return Stat(float(np.mean(values)), sd, error, interval)


def _ends(run: RunRecord, name: str) -> tuple[float, float] | None:
    low, high = (number(end) for end in run.summary.get(name) or (None, None))
    return None if low is None or high is None else (100 * low, 100 * high)


@dataclass(frozen=True)
class Difference:
    """An arm's measure minus another's."""

    mean: float
    error: float | None
    """Its standard error; None where there is none (a count of one seed)."""
    paired: bool = False
    """Whether it is over the same held-out images, image by image."""

    @property
    def sign(self) -> int | None:
        """+1 more, -1 less, 0 not clearly different; None where there is no standard error to tell by."""
        if self.error is None:
            return None
        return 0 if abs(self.mean) <= LIMIT * self.error else 1 if self.mean > 0 else -1


def difference(measure: Measure, ours: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> Difference | None:
    """How much more ``ours`` have of a measure than ``theirs``; None where one of them lacks it.

    Measures with a value per held-out image are compared image by image within each seed that both have, where the
    digests of the held-out images are equal; over seeds the mean counts, and its standard error is made of the spread
    over seeds and the mean standard error over images. Without such arrays the runs' own standard errors are put
    together as if the images were others. Counts have the spread over the seeds that both have, and nothing with one.
    """
    a, b = stat(measure, ours), stat(measure, theirs)
    if a is None or b is None:
        return None
    if pairs := _paired(measure, ours, theirs):
        means = [float(d.mean()) for d in pairs]
        errors = [float(d.std(ddof=1)) / math.sqrt(len(d)) for d in pairs]
        return Difference(float(np.mean(means)), math.hypot(_over_seeds(means), float(np.mean(errors))), True)
    gap = a.mean - b.mean
    if measure in MERIT:
        return Difference(gap, None if a.error is None or b.error is None else math.hypot(a.error, b.error))
    of_seed = {run.seed: value for run in theirs if (value := measure.read(run.summary)) is not None}
    seeds = [
        v - of_seed[run.seed] for run in ours if run.seed in of_seed and (v := measure.read(run.summary)) is not None
    ]
    if len(seeds) < 2:
        return Difference(gap, None)
    return Difference(float(np.mean(seeds)), _over_seeds(seeds))


def _over_seeds(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _paired(measure: Measure, ours: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> list[np.ndarray]:
    """Of each seed with the same held-out images on both sides: the differences image by image."""
    if not measure.per_image:
        return []
    factor = 100.0 if measure.unit == "%" else 1.0
    differences = []
    for run in ours:
        digest = run.summary.get("held_out_digest")
        for other in theirs:
            if other.seed != run.seed or digest is None or other.summary.get("held_out_digest") != digest:
                continue
            a, b = run.arrays.get(measure.per_image), other.arrays.get(measure.per_image)
            if a is not None and b is not None and len(a) == len(b) > 1:
                differences.append(factor * (a.astype(np.float64) - b.astype(np.float64)))
    return differences
