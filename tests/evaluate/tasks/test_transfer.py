"""Transfer: equal weights, sets that fail, and the interval of a mean of independent sets."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from uncollapse.errors import DataError
from uncollapse.evaluate.features import Features
from uncollapse.evaluate.result import Result, bootstrap95_mean
from uncollapse.evaluate.tasks.transfer import mean_interval, short_names, transfer


def features(n: int, seed: int, noise: float) -> Features:
    """Three classes around three directions."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.eye(8)[labels] + noise * torch.randn(n, 8, generator=rng)
    return Features(x[:, None], None, None, labels, torch.arange(n), ["a", "b", "c"])


SETS = {"easy": 0.05, "middle": 0.6, "hard": 3.0}


def extract(spec: str) -> tuple[Features, Features]:
    name = spec.rpartition("/")[2]
    if name not in SETS:
        raise DataError(f"{spec}: no such file or folder")
    size = 90 if name == "easy" else 300
    return features(200, 1, SETS[name]), features(size, 2, SETS[name])


@pytest.fixture
def stand_ins(monkeypatch):
    """Two tasks with known answers, so that the mean is known."""

    def task(name: str, shift: float):
        def run(train: Features, test: Features, seed: int = 0, device: str = "cpu") -> Result:
            value = {90: 1.0, 300: 0.5}[len(test)] - shift
            return Result(name, {"top1": value}, (value - 0.03, value + 0.05), len(test), f"{name}!", "here")

        return run

    for name, shift in (("knn", 0.0), ("linear", 0.1)):
        module = SimpleNamespace(**{name: task(name, shift)})
        monkeypatch.setitem(sys.modules, f"uncollapse.evaluate.tasks.{name}", module)


@pytest.mark.usefixtures("stand_ins")
def test_sets_have_equal_weight_whatever_their_size():
    result = transfer(extract, ["/data/easy", "/data/hard"])
    assert result.metrics == pytest.approx(
        {
            "knn_mean": 0.75,
            "linear_mean": 0.65,
            "knn easy": 1.0,
            "knn hard": 0.5,
            "linear easy": 0.9,
            "linear hard": 0.4,
        }
    )
    assert next(iter(result.metrics)) == "knn_mean"
    assert result.n == 390
    half = math.sqrt(2 * 0.04**2) / 2
    assert result.ci95 == pytest.approx((0.75 - half, 0.75 + half))
    assert "2 of 2 sets (easy, hard)" in result.protocol
    assert result.details["sets"]["easy"]["knn"]["top1"] == 1.0


@pytest.mark.usefixtures("stand_ins")
def test_a_set_that_fails_is_left_out_and_named():
    with pytest.warns(UserWarning, match="missing failed and is left out"):
        result = transfer(extract, ["/data/easy", "/data/missing", "/data/easy"])
    assert result.metrics["knn_mean"] == 1.0
    assert "1 of 2 sets" in result.protocol
    assert "failed: missing" in result.protocol
    assert "no such file" in result.details["failed"]["missing"]
    with pytest.raises(DataError, match=r"none of the 1 sets.*no such file"):
        transfer(extract, ["/data/missing"])
    with pytest.raises(DataError, match="no data set"):
        transfer(extract, [])


def test_with_the_real_tasks():
    pytest.importorskip("uncollapse.evaluate.tasks.knn")
    pytest.importorskip("uncollapse.evaluate.tasks.linear")
    result = transfer(extract, ["easy", "hard"])
    assert result.metrics["knn easy"] == 1.0
    assert result.metrics["linear easy"] > 0.95
    assert result.metrics["knn hard"] < 0.7
    assert result.ci95[0] <= result.metrics["knn_mean"] <= result.ci95[1]


def test_the_interval_agrees_with_a_bootstrap_of_all_sets_together():
    rng = np.random.default_rng(0)
    sets = [(rng.random(n) < p).astype(float) for n, p in ((200, 0.5), (900, 0.8), (400, 0.3))]
    low, high = mean_interval([s.mean() for s in sets], [bootstrap95_mean(s, seed=i) for i, s in enumerate(sets)])
    draws = np.mean([[s[rng.integers(0, len(s), len(s))].mean() for s in sets] for _ in range(3000)], axis=1)
    assert np.percentile(draws, [2.5, 97.5]) == pytest.approx([low, high], abs=0.004)
    assert all(math.isnan(v) for v in mean_interval([0.5], [(math.nan, math.nan)]))


def test_names():
    assert short_names(["torchvision:CIFAR10@/x", "builtin:digits", "/a/pets/", "a/cars,b/cars"]) == [
        "CIFAR10",
        "digits",
        "pets",
        "cars",
    ]
    assert short_names(["/a/pets", "/b/pets", "/c/cars"]) == ["/a/pets", "/b/pets", "cars"]
