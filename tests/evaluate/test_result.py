"""Intervals against SciPy's bootstrap."""

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from uncollapse.evaluate.result import bootstrap95, bootstrap95_class_means, bootstrap95_mean, spread95


@pytest.mark.parametrize("values", [np.repeat([0.0, 1.0], [60, 140]), np.random.default_rng(0).normal(size=300)])
def test_bootstrap_of_a_mean_is_scipys(values):
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    for ours in (bootstrap95_mean(values, 4000), bootstrap95(lambda i: values[i].mean(), len(values), 2000)):
        assert ours[0] == pytest.approx(theirs.confidence_interval.low, abs=0.1 * width)
        assert ours[1] == pytest.approx(theirs.confidence_interval.high, abs=0.1 * width)


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0.3 <= high
        for low, high in (bootstrap95_mean((rng.random(400) < 0.3).astype(float), seed=i) for i in range(300))
    ]
    assert 0.9 < np.mean(hits) < 0.99


def test_resamples_without_a_value_are_left_out():
    assert not math.isnan(bootstrap95(lambda i: np.nan if 0 in i else 1.0, 5)[0])
    assert math.isnan(bootstrap95(lambda i: np.nan, 5)[0])


def test_spread_is_students_interval():
    low, high = spread95([0.1, 0.2, 0.4])
    expected = t.interval(0.95, 2, np.mean([0.1, 0.2, 0.4]), np.std([0.1, 0.2, 0.4], ddof=1) / 3**0.5)
    assert (low, high) == pytest.approx(expected)
    assert math.isnan(spread95([0.3])[0])


@pytest.mark.parametrize("binary", [True, False])
def test_class_means_are_formed_anew_in_every_resample(binary):
    rng = np.random.default_rng(0)
    classes = rng.choice([0, 3, 7], 400, p=[0.7, 0.25, 0.05])
    values = rng.random(400)
    values = (values < 0.2 + 0.1 * classes).astype(float) if binary else values

    def macro(i):
        return np.mean([values[i][classes[i] == c].mean() for c in np.unique(classes[i])])

    ours, plain = bootstrap95_class_means(values, classes, 4000), bootstrap95(macro, 400, 4000, seed=1)
    assert ours == pytest.approx(plain, abs=0.12 * (plain[1] - plain[0]))
