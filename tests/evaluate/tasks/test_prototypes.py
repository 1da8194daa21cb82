"""Which class each prototype stands for, beside counting written out image by image."""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.ownership import ownership
from uncollapse.evaluate.tasks.prototypes import FEWEST, prototype_owners
from uncollapse.figures.owners import draw_owners


def features(labels, z, classes=()) -> Features:
    labels = torch.as_tensor(labels, dtype=torch.int64)
    z = torch.nn.functional.normalize(z.float(), dim=1)
    return Features(z[:, None].clone(), None, z, labels, torch.arange(len(z)), list(classes))


def random(n: int, seed: int, classes: int = 4, dim: int = 6) -> Features:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    z = torch.randn(n, dim, generator=rng)
    z[torch.arange(n), labels] += 1.5
    return features(labels, z, [f"c{i}" for i in range(classes)])


def prototypes(seed: int, k: int = 14, dim: int = 6) -> torch.Tensor:
    """Some of them are near-copies of others."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(k, dim, generator=rng)
    w[k // 2 :] = w[torch.randint(k // 2, (k - k // 2,), generator=rng)] + 0.05 * torch.randn(
        k - k // 2, dim, generator=rng
    )
    return torch.nn.functional.normalize(w, dim=1)


def on(prototype: list[int], w: torch.Tensor) -> torch.Tensor:
    return w[torch.tensor(prototype)]


def brute(train: Features, test: Features, w: torch.Tensor, eps: float) -> dict[str, object]:
    cos = w.double() @ w.double().T
    kept: list[int] = []
    for i in range(len(w)):
        if all(1 - cos[i, j] >= eps for j in kept):
            kept.append(i)
    group = [i if i in kept else max(kept, key=lambda j: cos[i, j]) for i in range(len(w))]
    mine, theirs = ((f.projections @ w.T).argmax(1).tolist() for f in (train, test))

    def owners(of: list[int]) -> dict[int, int]:
        votes = defaultdict(Counter)
        for k, label in zip(of, train.labels.tolist(), strict=True):
            votes[k][label] += 1
        return {k: min(v, key=lambda c: (-v[c], c)) for k, v in votes.items()}

    single, together = owners(mine), owners([group[k] for k in mine])
    truth = test.labels.tolist()
    on_each = defaultdict(Counter)
    for k, label in zip(theirs, truth, strict=True):
        on_each[k][label] += 1
    entropy = {k: -sum(n / v.total() * math.log2(n / v.total()) for n in v.values()) for k, v in on_each.items()}
    copies = Counter(group)
    right = [single.get(k) == label for k, label in zip(theirs, truth, strict=True)]
    double = [r for r, k in zip(right, theirs, strict=True) if copies[group[k]] > 1]
    alone = [r for r, k in zip(right, theirs, strict=True) if copies[group[k]] == 1]
    return {
        "top1": np.mean(right),
        "top1_merged": np.mean([together.get(group[k]) == label for k, label in zip(theirs, truth, strict=True)]),
        "purity": sum(max(v.values()) for v in on_each.values()) / len(truth),
        "class_entropy_bits": sum(entropy[k] * v.total() for k, v in on_each.items()) / len(truth),
        "coverage": len(set(single.values())) / len(set(train.labels.tolist())),
        "coverage_test": len({t for r, t in zip(right, truth, strict=True) if r}) / len(set(truth)),
        "duplicates_top1": np.mean(double) if double else math.nan,
        "distinct_top1": np.mean(alone) if alone else math.nan,
        "duplicates_usage": len(double) / len(truth),
        "n_used": len(on_each),
        "n_owned": len(single),
        "owned": [list(single.values()).count(c) for c in range(4)],
        "distinct": [list(together.values()).count(c) for c in range(4)],
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.001, 0.025, 0.3]))
def test_everything_is_what_counting_gives(seed: int, n: int, eps: float) -> None:
    train, test, w = random(50, seed), random(n, seed + 1), prototypes(seed)
    result, expected = prototype_owners(train, test, w, eps), brute(train, test, w, eps)
    for name in ("owned", "distinct"):
        counts = expected.pop(name)
        found = result.details["classes"]["prototypes" if name == "owned" else name]
        assert found == counts
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, nan_ok=True), name
    assert result.metrics["top1"] <= result.metrics["purity"] + 1e-12
    assert result.ci95[0] <= result.metrics["top1"] <= result.ci95[1]


def test_random_groups_of_the_same_sizes_show_what_small_groups_flatter() -> None:
    rng = torch.Generator().manual_seed(0)
    w = torch.eye(300)
    labels = torch.randint(10, (300,), generator=rng)
    z = w[torch.randperm(300, generator=rng)]  # every image alone on its prototype: pure without knowing anything
    result = prototype_owners(features(labels, z), features(labels, z.roll(7, 0)), w)
    assert result.metrics["purity"] == result.metrics["purity_random"] == 1
    assert result.metrics["top1"] < 0.25
    assert result.details["prototypes_with_enough"]["n"] == 0
    assert math.isnan(result.details["prototypes_with_enough"]["purity"])
    everything = features(labels, torch.ones(300, 300))
    result = prototype_owners(everything, everything, w)
    share = float(torch.bincount(labels).max()) / 300
    assert result.metrics["purity_random"] == result.metrics["purity"] == pytest.approx(share)
    assert result.metrics["top1"] == result.metrics["top1_commonest"] == pytest.approx(share)


def test_a_tail_that_owns_nothing_shows() -> None:
    w = torch.eye(4)
    # 150 of class 0 on prototypes 0 and 1, 30 of class 1 on prototype 2, 5 of class 2 among class 0's
    train = features([0] * 150 + [1] * 30 + [2] * 5, on([0] * 75 + [1] * 75 + [2] * 30 + [1] * 5, w), ["h", "m", "t"])
    test = features([0, 0, 1, 1, 2, 2], on([0, 1, 2, 2, 1, 3], w), ["h", "m", "t"])
    m = prototype_owners(train, test, w).metrics
    assert (m["many_prototypes_per_class"], m["medium_prototypes_per_class"], m["few_prototypes_per_class"]) == (
        2,
        1,
        0,
    )
    assert (m["many_top1"], m["medium_top1"], m["few_top1"]) == (1, 1, 0)
    assert (m["coverage"], m["few_coverage"]) == (pytest.approx(2 / 3), 0)
    details = prototype_owners(train, test, w).details
    assert details["without_training_images"] == details["test_images_on_those"] == 1


def test_merging_copies_changes_owners_and_counts() -> None:
    w = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.02, 0], [0, 1, 0], [0, 0, 1]]), dim=1)
    train = features([0, 0, 1, 1, 1, 1], on([0, 0, 1, 1, 1, 2], w))
    o = ownership(train, train, w)
    assert o.group.tolist() == [0, 0, 2, 3]
    assert o.duplicated.tolist() == [True, True, False, False]
    assert o.owner.tolist() == [0, 1, 1, -1]
    assert o.merged_owner.tolist() == [1, 1, 1, -1]
    assert o.owned().tolist() == [1, 2]
    assert o.owned_distinct().tolist() == [0, 2]
    metrics = prototype_owners(train, train, w).metrics
    assert metrics["top1"] == 1
    assert metrics["top1_merged"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("kind", ["none", "all", "one"])
def test_no_duplicates_only_duplicates_and_a_single_prototype(kind: str) -> None:
    w = {"none": torch.eye(6), "all": torch.ones(6, 6), "one": torch.ones(1, 6)}[kind]
    result = prototype_owners(random(40, 0), random(30, 1), w)
    m = result.metrics
    if kind == "all":
        assert m["duplicates_usage"] == 1
        assert math.isnan(m["distinct_top1"])
        assert m["n_used"] == 1  # exact copies: the first takes all
        assert result.details["groups"] == 1
        assert result.details["distinct"]["prototypes"] == 0
    else:
        assert m["duplicates_usage"] == 0
        assert math.isnan(m["duplicates_top1"])
        assert m["distinct_top1"] == m["top1"] == m["top1_merged"]
    assert result.details["duplicates"]["images"] + result.details["distinct"]["images"] == 30
    o = ownership(random(40, 0), random(30, 1), w)
    picture, alt = draw_owners(o.class_train, o.owned(), o.owned_distinct(), np.array([3.0, 4.0, math.nan, 5.0]))
    assert picture.startswith("data:image/svg+xml;base64,")
    assert "4 classes" in alt


def test_classes_without_training_images_are_errors_and_own_nothing() -> None:
    train, test = random(60, 0), random(60, 1)
    m = prototype_owners(train.take(train.labels != 3), test, prototypes(0)).metrics
    whole = prototype_owners(train, test, prototypes(0)).metrics
    assert m["top1"] <= float((test.labels != 3).double().mean())
    assert m["coverage_test"] <= 0.75 < whole["coverage_test"]


def test_a_prototype_needs_a_few_images_for_a_number_of_its_own() -> None:
    w = torch.eye(3)
    test = features([0] * FEWEST + [1] * (FEWEST - 1), on([0] * FEWEST + [1] * (FEWEST - 1), w))
    found = prototype_owners(test, test, w).details["prototypes_with_enough"]
    assert found == {"fewest": FEWEST, "n": 1, "purity": 1.0, "class_entropy_bits": 0.0}


def test_what_cannot_be_assigned_says_so() -> None:
    train, test, w = random(20, 0), random(10, 1), prototypes(0)
    with pytest.raises(ValueError, match="no projections"):
        prototype_owners(train, dataclasses.replace(test, projections=None), w)
    with pytest.raises(ValueError, match="no labels"):
        prototype_owners(dataclasses.replace(train, labels=None), test, w)
    with pytest.raises(ValueError, match="zero or non-finite"):
        prototype_owners(train, dataclasses.replace(test, projections=test.projections * float("nan")), w)
    with pytest.raises(ValueError, match="6 columns and w has 5"):
        prototype_owners(train, test, w[:, :5])
    with pytest.raises(ValueError, match="eps"):
        prototype_owners(train, test, w, 0.0)
