"""Probes against a naive loop, scikit-learn and published intervals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from gaussian_classes import task
from uncollapse.measure import nearest as neighbours
from uncollapse.measure.linear import linear_probe
from uncollapse.measure.probes import confidence95, knn_predictions


def naive_knn(
    train: torch.Tensor, y: torch.Tensor, test: torch.Tensor, t: torch.Tensor, k: int, temperature: float
) -> float:
    a, b = (x.double().numpy() for x in (train, test))
    right = 0
    for q, label in zip(b, t.tolist(), strict=True):
        cos = [float(q @ r / np.linalg.norm(q) / np.linalg.norm(r)) for r in a]
        votes: dict[int, float] = {}
        for i in sorted(range(len(a)), key=lambda i: -cos[i])[:k]:
            votes[int(y[i])] = votes.get(int(y[i]), 0.0) + math.exp(cos[i] / temperature)
        right += max(votes, key=lambda c: votes[c]) == label
    return right / len(b)


def knn_accuracy(
    x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, t: torch.Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    return float((knn_predictions(x, y, test, [k], temperature)[k] == t).double().mean())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(5, 60),
    st.integers(1, 5),
    st.sampled_from([0.01, 0.07, 1.0]),
    st.booleans(),
)
def test_knn_is_the_naive_loop(seed: int, n: int, k: int, temperature: float, far_labels: bool) -> None:
    x, y = task(n, 6, 4, 1.5, seed)
    test, t = task(23, 6, 4, 1.5, seed + 1)
    if far_labels:
        y, t = y * 1000 - 7, t * 1000 - 7
    assert knn_accuracy(x, y, test, t, k, temperature) == pytest.approx(naive_knn(x, y, test, t, k, temperature))


def test_knn_in_chunks_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank large enough for the grouped selection, with a tail, and chunks of a few queries."""
    x, y = task(1500, 8, 5, 2.0, 0)
    test, t = task(60, 8, 5, 2.0, 1)
    expected = naive_knn(x, y, test, t, 5, 0.07)
    assert 0.2 < expected < 0.95
    assert knn_accuracy(x, y, test, t, 5) == pytest.approx(expected)
    monkeypatch.setattr(neighbours, "rows_at_once", lambda *_, **__: 7)
    assert knn_accuracy(x, y, test, t, 5) == pytest.approx(expected)


def test_grouped_selection_finds_the_largest() -> None:
    similar = torch.randn(9, 64 * 50 + 13, generator=torch.Generator().manual_seed(0))
    similar[0, -3:] = 10.0  # in the tail
    similar[1, 128:140] = 9.0 + torch.arange(12) / 10  # all in one group
    top, index = neighbours._largest(similar, 12)
    assert torch.equal(top, similar.topk(12, 1)[0])
    assert torch.equal(similar.gather(1, index), top)


def test_knn_at_a_high_temperature_is_scikit_learns_vote() -> None:
    x, y = task(300, 10, 3, 2.0, 2)
    test, t = task(100, 10, 3, 2.0, 3)
    reference = KNeighborsClassifier(1, metric="cosine").fit(x.numpy(), y.numpy())
    assert knn_accuracy(x, y, test, t, 1) == pytest.approx(reference.score(test.numpy(), t.numpy()))
    near_uniform = KNeighborsClassifier(15, metric="cosine", weights=lambda d: np.exp((1 - d) / 5.0))
    near_uniform.fit(x.numpy(), y.numpy())
    assert knn_accuracy(x, y, test, t, 15, 5.0) == pytest.approx(near_uniform.score(test.numpy(), t.numpy()))


def test_knn_survives_a_cold_temperature_and_unseen_classes() -> None:
    x, y = torch.eye(4), torch.arange(4)
    assert knn_accuracy(x, y, x, y, 4, 1e-4) == 1.0
    assert knn_accuracy(x, y, x, torch.tensor([0, 1, 2, 9]), 1) == 0.75
    assert knn_accuracy(x.half(), y, 5 * x.double(), y, 1) == 1.0


def test_knn_bad_input() -> None:
    x, y = torch.eye(4), torch.arange(4)
    for k in (0, 5):
        with pytest.raises(ValueError, match="4 training features"):
            knn_accuracy(x, y, x, y, k)
    with pytest.raises(ValueError, match="temperature"):
        knn_accuracy(x, y, x, y, 1, 0.0)
    with pytest.raises(ValueError, match="all zero"):
        knn_accuracy(torch.zeros(4, 4), y, x, y, 1)


@pytest.mark.parametrize("probe", [lambda *a: knn_accuracy(*a, k=1), lambda x, y, test, t: linear_probe(x, y, test)])
def test_bad_features_are_named(probe: object) -> None:
    assert callable(probe)
    x, y = torch.eye(4), torch.arange(4)
    broken = x.clone()
    broken[2, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of the 4 test features are NaN"):
        probe(x, y, broken, y)
    with pytest.raises(ValueError, match="1 of the 4 train features are NaN"):
        probe(broken, y, x, y)
    with pytest.raises(ValueError, match="one label per row"):
        probe(x, y[:3], x, y)
    with pytest.raises(ValueError, match="labels integers"):
        probe(x, y.float(), x, y)
    with pytest.raises(ValueError, match="one encoder for both"):
        probe(x, y, x[:, :3], y)


def test_wilson_interval() -> None:
    assert confidence95(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)  # published worked values
    assert confidence95(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = confidence95(1.0, 10)
    assert (low, high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for bad in ((1.1, 10), (0.5, 0)):
        with pytest.raises(ValueError, match=r"accuracy in \[0, 1\]"):
            confidence95(*bad)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_ends_solve_the_score_equation(n: int, p: float) -> None:
    for end in confidence95(p, n):
        if 1e-9 < end < 1 - 1e-9:
            assert (p - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-4)
