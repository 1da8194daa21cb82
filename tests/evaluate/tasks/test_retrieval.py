"""Retrieval, beside scikit-learn, torchmetrics and rankings written out."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torchmetrics.retrieval import RetrievalMAP

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks import retrieval as module
from uncollapse.evaluate.tasks.retrieval import average_precisions, chance, retrieval


def features(labels, x, classes=()) -> Features:
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Features(x[:, None].float(), None, None, labels, torch.arange(len(x)), list(classes))


def random(n: int, seed: int, classes: int = 5, dim: int = 6) -> Features:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    x = torch.randn(n, dim, generator=rng)
    x[:, 0] += labels
    return features(labels, x)


def cosines(test: Features, train: Features) -> np.ndarray:
    a, b = (torch.nn.functional.normalize(f.last, dim=1) for f in (test, train))
    return (a @ b.T).numpy()


def per_query(train: Features, test: Features, top: int = 100) -> dict[str, np.ndarray]:
    return average_precisions(train.last, train.labels.numpy(), test.last, test.labels.numpy(), top)


def on_axes(x: torch.Tensor) -> torch.Tensor:
    largest = x.abs() == x.abs().amax(-1, keepdim=True)
    return x.sign() * largest


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 80), st.booleans())
def test_average_precision_is_scikit_learns(seed: int, n: int, ties: bool) -> None:
    train, test = random(n, seed), random(12, seed + 1)
    if ties:  # along the axes: cosines that are equal are equal to the last bit
        train, test = (dataclasses.replace(f, cls=on_axes(f.cls)) for f in (train, test))
    found = per_query(train, test)
    similar = cosines(test, train)
    for i, row in enumerate(similar):
        relevant = train.labels.numpy() == int(test.labels[i])
        if relevant.any():
            assert found["ap"][i] == pytest.approx(average_precision_score(relevant, row), abs=1e-9)
        else:
            assert math.isnan(found["ap"][i])


def test_map_is_torchmetrics() -> None:
    train, test = random(200, 0), random(40, 1)
    similar = torch.from_numpy(cosines(test, train)) + 2  # torchmetrics counts no hit whose score is not above 0
    relevant = test.labels[:, None] == train.labels[None]
    index = torch.arange(40)[:, None].expand_as(similar)
    theirs = RetrievalMAP(empty_target_action="skip")(similar.flatten(), relevant.flatten(), index.flatten())
    assert retrieval(train, test).metrics["map"] == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("top", [1, 7, 100])
def test_cut_rankings_by_hand(top: int) -> None:
    train, test = random(60, 3), random(20, 4)
    result = retrieval(train, test, top)
    precision, first = [], {1: [], 10: []}
    for row, label in zip(cosines(test, train), test.labels.tolist(), strict=True):
        hits = train.labels.numpy()[np.argsort(-row)] == label
        ranks = np.flatnonzero(hits[:top])
        precision.append(sum((i + 1) / (rank + 1) for i, rank in enumerate(ranks)) / min(top, hits.sum()))
        for k, shares in first.items():
            shares.append(hits[:k].any())
    assert result.metrics[f"map_at_{top}"] == pytest.approx(np.mean(precision))
    assert result.metrics["recall_at_1"] == pytest.approx(np.mean(first[1]))
    assert result.metrics["recall_at_10"] == pytest.approx(np.mean(first[10]))


def test_ties_are_worth_what_their_orders_are_worth() -> None:
    # one image above, five tied of which two count, one below
    x = torch.tensor([[1.0, 0.0], *[[1.0, 1.0]] * 5, [0.0, 1.0]])
    labels = [1, 0, 1, 0, 1, 1, 0]
    query = features([0], torch.tensor([[1.0, 0.0]]))
    found = per_query(features(labels, x), query)
    assert found["ap"][0] == pytest.approx((2 / 6 + 2 / 6 + 3 / 7) / 3)
    assert found["recall_1"][0] == 0
    same = features([0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], torch.ones(14, 2))
    found = per_query(same, query)
    assert found["ap"][0] == pytest.approx(2 / 14)
    assert found["recall_1"][0] == pytest.approx(2 / 14)
    orders = list(itertools.combinations(range(14), 2))
    assert found["recall_10"][0] == pytest.approx(np.mean([min(order) < 10 for order in orders]))


def test_a_shuffled_bank_changes_nothing() -> None:
    train, test = random(50, 0), random(20, 1)
    train, test = (dataclasses.replace(f, cls=on_axes(f.cls)) for f in (train, test))  # with ties
    shuffled = train.take(torch.randperm(50, generator=torch.Generator().manual_seed(2)))
    assert retrieval(train, test).metrics == pytest.approx(retrieval(shuffled, test).metrics, abs=1e-6)


def test_memory_is_bounded_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = random(50, 0), random(33, 1)
    whole = per_query(train, test)
    seen = []
    sort = module._sort
    monkeypatch.setattr(module, "rows_at_once", lambda *_, **__: 3)
    monkeypatch.setattr(module, "_sort", lambda x: (seen.append(x.numel()), sort(x))[1])
    pieces = per_query(train, test)
    assert max(seen) <= 150
    for name, values in whole.items():
        np.testing.assert_allclose(pieces[name], values, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_ranks_alike() -> None:
    train, test = random(3000, 0), random(200, 1)
    assert retrieval(train, test, device="cuda").metrics == pytest.approx(retrieval(train, test).metrics, abs=1e-4)


def test_chance_is_the_mean_of_random_orders() -> None:
    orders = itertools.combinations(range(6), 2)
    expected = np.mean([average_precision_score(np.isin(np.arange(6), o), -np.arange(6)) for o in orders])
    assert chance(np.array([2]), 6)[0] == pytest.approx(expected)
    assert chance(np.array([6]), 6)[0] == pytest.approx(1)
    assert chance(np.array([1]), 1)[0] == 1


def test_queries_without_relevant_images_are_left_out_and_counted() -> None:
    train, test = random(60, 0), random(40, 1)
    without = train.take(train.labels != 2)
    result = retrieval(without, test)
    left = int((test.labels == 2).sum())
    assert left > 0
    assert result.n == 40 - left
    assert result.details["queries_without_relevant"] == left
    assert result.metrics == retrieval(without, test.take(test.labels != 2)).metrics
    assert "2" not in result.details["map_of_class"]
    with pytest.raises(ValueError, match="nothing to retrieve"):
        retrieval(train.take(train.labels < 2), test.take(test.labels > 2))


def test_classes_weigh_the_same_in_the_mean_per_class() -> None:
    train = features([0, 0, 1, 1], torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), ["left", "right"])
    test = features([0] * 9 + [1], torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 0.0]]), ["left", "right"])
    result = retrieval(train, test)
    wrong = (1 / 3 + 2 / 4) / 2
    assert result.details["map_of_class"] == {"left": 1.0, "right": pytest.approx(wrong, abs=1e-6)}
    assert result.metrics["map"] == pytest.approx(0.9 + 0.1 * wrong)
    assert result.metrics["map_per_class"] == pytest.approx((1 + wrong) / 2)
    assert result.ci95[0] <= result.metrics["map"] <= result.ci95[1]


def test_one_image_per_class_and_small_banks() -> None:
    x = torch.eye(4)
    result = retrieval(features(range(4), x), features(range(4), x))
    assert result.metrics["map"] == result.metrics["recall_at_1"] == result.metrics["map_at_100"] == 1
    far = retrieval(features([0], x[:1]), features([0, 0], x[1:3]))
    assert far.metrics["map"] == far.metrics["recall_at_10"] == 1  # a bank of one


def test_what_cannot_be_ranked_says_so() -> None:
    train, test = random(20, 0), random(10, 1)
    bad = test.cls.clone()
    bad[2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        retrieval(train, dataclasses.replace(test, cls=bad))
    with pytest.raises(ValueError, match="top must be at least 1"):
        retrieval(train, test, 0)
    with pytest.raises(ValueError, match="no labels"):
        retrieval(dataclasses.replace(train, labels=None), test)
