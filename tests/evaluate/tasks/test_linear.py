"""The linear probe's grid: chosen on training data, as good as scikit-learn's, and its rules."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.linear import inputs, linear
from uncollapse.measure.linear import RATES, split


def tokens(x, y, classes=None, mean=None):
    return Features(x, mean, None, y, torch.arange(len(x)), [str(c) for c in range(classes or int(y.max()) + 1)])


def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.from_numpy(x[order]).float()[:, None], torch.from_numpy(y[order])
    return tokens(x[:1200], y[:1200]), tokens(x[1200:], y[1200:])


def test_as_accurate_as_logistic_regression_on_real_digits():
    train, test = digits()
    result = linear(train, test)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    theirs = model.fit(train.last, train.labels).score(test.last, test.labels)
    assert result.metrics["top1"] > theirs - 0.015
    assert result.metrics["top5"] > result.metrics["top1"]
    assert result.ci95[0] < result.metrics["top1"] < result.ci95[1]
    assert result.details["classifiers"] == len(RATES) == len(result.details["held_out_scores"])
    assert linear(train, test).metrics == result.metrics


def test_shuffled_labels_give_chance():
    train, test = digits()
    shuffled = tokens(train.cls, train.labels[torch.randperm(1200, generator=torch.Generator().manual_seed(0))])
    assert linear(shuffled, test).metrics["top1"] < 0.2


def test_the_grid_covers_blocks_and_pooling_and_finds_where_the_signal_is():
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (900,), generator=rng)
    noise = torch.randn(900, 4, 8, generator=rng)
    signal = noise.clone()
    signal[:, 1] += 4 * torch.eye(8)[y]  # only an earlier block knows
    mean = torch.randn(900, 4, 8, generator=rng)
    part = [tokens(signal[s], y[s], 3, mean[s]) for s in (slice(0, 600), slice(600, 900))]
    assert len(inputs(part[0])) == 4
    result = linear(*part)
    assert result.metrics["top1"] > 0.9
    assert "4 blocks" in result.details["chosen"]
    assert result.details["classifiers"] == 4 * len(RATES)
    assert linear(*[tokens(noise[s], y[s], 3) for s in (slice(0, 600), slice(600, 900))]).metrics["top1"] < 0.5


def test_test_labels_never_choose():
    train, test = digits()
    other = tokens(test.cls, (test.labels + 1) % 10)
    assert linear(train, test).details["chosen"] == linear(train, other).details["chosen"]


def test_constant_and_huge_features_do_no_harm():
    train, test = digits()
    for part in (train, test):
        part.cls[:, :, 0] = 7.0
        part.cls[:, :, 1] *= 1e6
    assert linear(train, test).metrics["top1"] > 0.9


@pytest.mark.parametrize("counts", [[50, 50], [1, 1, 30], [2, 2, 2, 2], [1, 1, 1, 5]])
def test_held_out_images_leave_every_class_to_fit_on(counts):
    y = np.repeat(np.arange(len(counts)), counts)
    fit, check = split(y, 0.1, 0)
    assert set(y[fit]) == set(y)
    assert len(check) >= 1
    assert sorted([*fit, *check]) == list(range(len(y)))


def test_bad_input_is_named():
    train, test = digits()
    with pytest.raises(ValueError, match="one class"):
        linear(tokens(train.cls, torch.zeros(1200, dtype=torch.long), 10), test)
    with pytest.raises(ValueError, match="fewshot"):
        linear(tokens(train.cls[:10], torch.arange(10)), test)
    keep = train.labels != 9
    result = linear(train.take(keep), test)
    assert f"{int((test.labels == 9).sum())} test images" in result.details["unseen"]
