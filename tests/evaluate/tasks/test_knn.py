"""Weighted kNN against scikit-learn, and its rules."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.knn import knn, predictions
from uncollapse.measure import nearest as neighbours
from uncollapse.measure.nearest import nearest


def features(n, classes=4, d=12, seed=0, spread=1.0, labels=True):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, d))
    y = rng.integers(0, classes, n)
    x = torch.from_numpy(centres[y] + spread * rng.normal(size=(n, d))).float()
    return Features(
        x[:, None], None, None, torch.from_numpy(y) if labels else None, torch.arange(n), list("abcdefgh"[:classes])
    )


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), bank=st.integers(1, 3000), k=st.integers(1, 30), seed=st.integers(0, 50))
def test_nearest_is_what_sorting_everything_gives(n, bank, k, seed):
    rng = torch.Generator().manual_seed(seed)
    x, q = torch.randn(bank, 6, generator=rng), torch.randn(n, 6, generator=rng)
    k = min(k, bank)
    values, index = nearest(x, q, k)
    torch.testing.assert_close(values, (q @ x.T).topk(k, 1)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((q[:, None] * x[index]).sum(-1), values, rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == k for row in index.tolist())


def test_a_bank_in_parts_gives_the_same(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x, q = torch.randn(5000, 8, generator=rng), torch.randn(70, 8, generator=rng)
    whole = nearest(x, q, 50)
    monkeypatch.setattr(neighbours, "_BANK", 700)
    monkeypatch.setattr(neighbours, "rows_at_once", lambda *_, **__: 12)
    parts = nearest(x, q, 50)
    torch.testing.assert_close(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_votes_are_those_of_scikit_learn():
    train, test = features(400, seed=1), features(150, seed=2)
    for k in (1, 10, 50):
        x, q = F.normalize(train.last, dim=1).double(), F.normalize(test.last, dim=1).double()

        def weights(distance):  # squared Euclidean distance of unit vectors is 2 - 2 cos
            return np.exp((1 - distance**2 / 2) / 0.07)

        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(x, train.labels).predict(q)
        assert (predictions(train, test, [k])[k].numpy() == theirs).mean() > 0.99


def test_headline_is_fixed_and_every_k_comes_with_it():
    result = knn(features(500, seed=1), features(200, seed=2))
    assert list(result.metrics) == ["top1", "top1_k10", "top1_k20", "top1_k100", "top1_k200"]
    assert result.metrics["top1"] == result.metrics["top1_k20"]
    assert result.ci95[0] <= result.metrics["top1"] <= result.ci95[1]
    assert result.n == 200
    noise = knn(features(500, seed=1, spread=1e4), features(200, seed=2, spread=1e4))
    assert 0.1 < noise.metrics["top1"] < 0.4  # four classes, no signal


def test_small_sets_lose_the_large_k_and_say_so():
    result = knn(features(60, seed=1), features(20, seed=2))
    assert "100" in result.details["left_out"]
    assert "top1_k100" not in result.metrics
    few = knn(features(5), features(5))
    assert few.details["k"] == 5
    assert set(few.metrics) == {"top1", "top1_k5"}
    with pytest.raises(ValueError, match="no k is given"):
        knn(features(5), features(5), ks=())


def test_bad_input_is_named():
    good, bad = features(50, seed=1), features(50, seed=2)
    bad.cls[3] = torch.nan
    with pytest.raises(ValueError, match="1 of 50 test features are NaN"):
        knn(good, bad, ks=[5])
    with pytest.raises(ValueError, match="no labels"):
        knn(good, features(50, labels=False), ks=[5])
    with pytest.raises(ValueError, match="temperature"):
        knn(good, good, ks=[5], temperature=0)


def test_classes_missing_from_train_count_as_wrong():
    train, test = features(200, seed=1), features(100, seed=2)
    keep = train.labels != 3
    result = knn(train.take(keep), test, ks=[5])
    assert f"{int((test.labels == 3).sum())} test images" in result.details["unseen"]
    assert result.metrics["top1"] <= 1 - float((test.labels == 3).float().mean())
