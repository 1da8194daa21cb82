"""Clusters against classes, beside scikit-learn, scipy's dense matching and simulated samples."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sk
from sklearn.cluster import KMeans

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.cluster import (
    Table,
    agreement,
    agreement_intervals,
    cluster,
    expected_information,
    kmeans,
    matched_accuracy,
)


def features(labels, cls, projections=None, classes=("a", "b", "c")) -> Features:
    n = len(cls)
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return Features(cls[:, None].float(), None, projections, labels, torch.arange(n), list(classes))


def blobs(n: int, seed: int, spread: float = 0.2, classes: int = 3, dim: int = 8) -> Features:
    """Three classes around fixed directions; projections are the features."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = centres[labels] + spread * torch.randn(n, dim, generator=rng)
    return features(labels, x, torch.nn.functional.normalize(x, dim=1), [f"c{i}" for i in range(classes)])


def directions(k: int, seed: int = 5, dim: int = 8) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(k, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


partitions = st.integers(2, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 12), min_size=n, max_size=n), st.lists(st.integers(0, 5), min_size=n, max_size=n)
    )
)


@settings(max_examples=50, deadline=None)
@given(partitions)
def test_agreement_is_scikit_learns(given_: tuple[list[int], list[int]]) -> None:
    c, y = map(np.array, given_)
    found = agreement(c, y)
    assert found["ami"] == pytest.approx(sk.adjusted_mutual_info_score(y, c), abs=1e-6)
    assert found["nmi"] == pytest.approx(sk.normalized_mutual_info_score(y, c))
    assert found["ari"] == pytest.approx(sk.adjusted_rand_score(y, c))
    assert found["fmi"] == pytest.approx(sk.fowlkes_mallows_score(y, c))
    table = sk.cluster.contingency_matrix(y, c)
    rows, columns = linear_sum_assignment(table, maximize=True)
    assert found["accuracy"] == pytest.approx(table[rows, columns].sum() / len(y))
    assert found["purity"] == pytest.approx(table.max(0).sum() / len(y))
    assert found["accuracy"] <= found["purity"] + 1e-12


def test_expected_information_is_the_mean_over_shuffles() -> None:
    rng = np.random.default_rng(0)
    c, y = rng.integers(0, 15, 80), rng.integers(0, 4, 80)
    shuffled = [sk.mutual_info_score(y, rng.permutation(c)) for _ in range(300)]
    assert expected_information(np.bincount(c), np.bincount(y)) == pytest.approx(np.mean(shuffled), abs=0.01)


def test_matching_tries_every_assignment() -> None:
    rng = np.random.default_rng(1)
    for clusters, classes in ((5, 3), (3, 5), (4, 4), (1, 3)):
        c, y = rng.integers(0, clusters, 40), rng.integers(0, classes, 40)
        small, large = sorted((clusters, classes))
        best = 0
        for order in itertools.permutations(range(large), small):
            pairs = zip(order, range(small), strict=True)
            if clusters <= classes:
                best = max(best, sum(int(((c == j) & (y == i)).sum()) for i, j in pairs))
            else:
                best = max(best, sum(int(((c == i) & (y == j)).sum()) for i, j in pairs))
        assert matched_accuracy(c, y) == pytest.approx(best / 40)


def test_images_of_unmatched_clusters_are_errors() -> None:
    y = np.repeat([0, 1], 10)
    c = np.concatenate([np.repeat([0, 1], 5), np.repeat([2, 3], 5)])  # every cluster is pure
    found = agreement(c, y)
    assert found["purity"] == 1
    assert found["accuracy"] == 0.5


def test_the_interval_covers_what_a_bootstrap_misses() -> None:
    # More clusters than images can tell apart: the AMI is 0, and twins in a bootstrap sample hide that.
    rng = np.random.default_rng(2)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 150, 200), rng.integers(0, 10, 200)

    truth = np.mean([Table.of(*sample()).ami() for _ in range(100)])
    covered = twins = 0
    for seed in range(24):
        c, y = sample()
        low, high = agreement_intervals(c, y, 50, seed)["ami"]
        covered += low <= truth <= high
        drawn = [Table.of(c[i], y[i]).ami() for i in rng.integers(0, 200, (20, 200))]
        twins += np.percentile(drawn, 2.5) <= truth
    assert covered >= 20
    assert twins <= 2


def test_perfect_clusters_have_a_perfect_score_and_interval() -> None:
    y = np.arange(90) % 3
    assert all(ends == pytest.approx((1, 1)) for ends in agreement_intervals(2 - y, y).values())
    assert all(agreement(2 - y, y)[m] == pytest.approx(1) for m in ("ami", "nmi", "ari", "fmi", "accuracy", "purity"))


def test_kmeans_is_fitted_on_training_images_alone() -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    found, how = kmeans(train.last, test.last, 3, seed=0)
    unit = [torch.nn.functional.normalize(x, dim=1).numpy() for x in (train.last, test.last)]
    expected = KMeans(3, n_init=10, random_state=0).fit(unit[0]).predict(unit[1])
    assert found.tolist() == expected.tolist()
    assert "k = 3" in how
    # what else is in the test set moves nothing
    alone, _ = kmeans(train.last, test.last[:7], 3, seed=0)
    assert alone.tolist() == found[:7].tolist()


def test_large_data_goes_in_mini_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uncollapse.evaluate.tasks.cluster.WHOLE", 100)
    train, test = blobs(90, 0), blobs(60, 1)
    found, how = kmeans(train.last, test.last, 3)
    assert "mini-batch" in how
    assert matched_accuracy(found, test.labels.numpy()) == 1


def test_result_leads_with_the_prototypes_where_there_are_any() -> None:
    train, test = blobs(90, 0), blobs(60, 1)
    w = directions(40)
    result = cluster(train, test, w)
    argmax = (test.projections @ w.T).argmax(1).numpy()
    first = next(iter(result.metrics))
    assert first == "prototypes_ami"
    assert result.metrics[first] == pytest.approx(sk.adjusted_mutual_info_score(test.labels, argmax))
    assert result.ci95[0] <= result.metrics[first] <= result.ci95[1]
    assert result.metrics["kmeans_accuracy"] == 1
    assert result.n == 60
    assert result.metrics["n_prototypes_used"] == len(set(argmax.tolist()))
    assert result == cluster(train, test, w), "the same seed gives the same numbers"

    alone = cluster(train, dataclasses.replace(test, projections=None), w)
    assert next(iter(alone.metrics)) == "kmeans_ami"
    assert "no head" in alone.details["left_out"]
    assert not any(name.startswith("prototypes") for name in cluster(train, test).metrics)


def test_a_single_prototype_agrees_with_nothing() -> None:
    result = cluster(blobs(30, 0), blobs(30, 1), directions(1))
    assert result.metrics["prototypes_ami"] == 0
    assert result.metrics["n_prototypes_used"] == 1
    assert result.metrics["prototypes_accuracy"] == pytest.approx(1 / 3)


def test_features_that_coincide_fill_one_cluster_without_noise(recwarn: pytest.WarningsRecorder) -> None:
    same = features(np.arange(30) % 3, torch.ones(30, 4))
    result = cluster(same, same)
    assert result.metrics["n_kmeans_used"] == 1
    assert result.metrics["kmeans_ami"] == 0
    assert not recwarn.list


def test_test_classes_without_training_images_count() -> None:
    train = blobs(60, 0).take(torch.arange(60) % 3 != 2)
    result = cluster(train, blobs(60, 1))
    assert result.details["k"] == 2
    assert result.details["classes"] == 3
    assert result.metrics["kmeans_accuracy"] <= 2 / 3 + 1e-9


def test_one_image_per_class() -> None:
    x = directions(6)
    one = features(range(6), x, x, [])
    result = cluster(one, one, x)
    assert result.metrics["prototypes_accuracy"] == result.metrics["kmeans_accuracy"] == 1


def broken(what: str) -> tuple[Features, Features]:
    train, test = blobs(30, 0), blobs(30, 1)
    bad = test.cls.clone()
    match what:
        case "labels":
            return train, dataclasses.replace(test, labels=None)
        case "nan":
            bad[3, 0, 0] = float("nan")
            return train, dataclasses.replace(test, cls=bad)
        case "zero":
            bad[3] = 0
            return train, dataclasses.replace(test, cls=bad)
        case "one class":
            return train, test.take(test.labels == 1)
        case "names":
            return train, dataclasses.replace(test, classes=["x", "y", "z"])
        case "empty":
            return train, test.take(torch.arange(0))
        case "width":
            return train, dataclasses.replace(test, cls=bad[:, :, :4])
        case "negative":
            return train, dataclasses.replace(test, labels=test.labels - 1)
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("labels", "no labels"),
        ("nan", "1 of 30 test features are NaN"),
        ("zero", "1 of 30 test features are all"),
        ("one class", "all of one class"),
        ("names", "number their classes differently"),
        ("empty", "no test images"),
        ("width", "8 columns, test features 4"),
        ("negative", "labels start at -1"),
    ],
)
def test_what_cannot_be_compared_says_so(what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster(*broken(what))


def test_kmeans_with_fewer_images_than_clusters() -> None:
    with pytest.raises(ValueError, match="got 2 for 3"):
        kmeans(torch.randn(2, 4), torch.randn(5, 4), 3)
