"""How prototypes are divided among classes, beside counting image by image and against chance."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.evaluate.features import Features
from uncollapse.evaluate.tasks.ownership import ownership
from uncollapse.evaluate.tasks.prototype_shares import FEWEST, shares
from uncollapse.evaluate.tasks.prototypes import prototype_owners

WIDE = np.array([0, 0, 0, 3, 3, 3, 6, 6, 6])


def features(labels, prototypes, w):
    """An image on each of the prototypes named."""
    z = w[torch.as_tensor(prototypes)]
    return Features(z[:, None].clone(), None, z, torch.as_tensor(labels), torch.arange(len(z)), [])


def counted(group, truth, classes):
    """Clusters that each class is on, and its share of those on which it is the commonest."""
    on = defaultdict(Counter)
    for g, c in zip(group, truth, strict=True):
        on[g][c] += 1
    used, own = [0] * classes, [0.0] * classes
    for votes in on.values():
        first = [c for c, n in votes.items() if n == max(votes.values())]
        for c in votes:
            used[c] += 1
        for c in first:
            own[c] += 1 / len(first)
    return used, own


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(FEWEST, 12))
def test_used_and_own_are_what_counting_gives(seed, classes, each):
    rng = np.random.default_rng(seed)
    w = torch.eye(9)
    w[8] = w[7]  # a copy
    labels = np.tile(np.arange(classes), each)
    train = features(labels, rng.integers(0, 9, len(labels)), w)
    test = features(labels, rng.integers(0, 9, len(labels)), w)
    o = ownership(train, test, w)
    s = shares(o, labels, labels, WIDE)
    used, own = counted(o.group[o.argmax].tolist(), labels.tolist(), classes)
    assert s.images == each
    assert s.used.tolist() == used
    assert s.used_wide.tolist() == counted(WIDE[o.argmax].tolist(), labels.tolist(), classes)[0]
    assert s.own.tolist() == pytest.approx(own)
    assert s.owned.tolist() == pytest.approx(counted(o.group[o.train_argmax].tolist(), labels.tolist(), classes)[1])
    assert s.owned_random.sum() == pytest.approx(s.owned.sum())


def test_every_class_is_looked_at_through_equally_many_images():
    w = torch.eye(12)
    labels = [0] * 60 + [1] * 6 + [2] * (FEWEST - 1)
    images = features(labels, [*(i % 10 for i in range(60)), *[10] * 6, *[11] * (FEWEST - 1)], w)
    s = shares(ownership(images, images, w), np.array(labels), np.array(labels), np.zeros(12, int))
    assert s.images == 6
    assert 2 <= s.used[0] <= 6  # of ten, as six images can be on six at most
    assert (s.used[1], s.used_wide[1], s.own[1]) == (1, 1, 1)
    assert np.isnan(s.used[2])
    assert np.isnan(s.own[2])


def test_nothing_is_said_of_classes_with_too_few_test_images():
    w = torch.eye(4)
    images = features([0, 0, 1, 1], [0, 1, 2, 3], w)
    s = shares(ownership(images, images, w), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), np.arange(4))
    assert s.images == 0
    assert np.isnan(s.used).all()


def imbalanced(rng, k, knows):
    """900, 90 and 9 training images, 200 test images of each class; each on prototypes of its class, or on any."""
    w = torch.eye(k)

    def part(counts):
        labels = np.repeat(np.arange(3), counts)
        on = rng.integers(0, k // 3, len(labels)) + labels * (k // 3) if knows else rng.integers(0, k, len(labels))
        return features(labels, on, w)

    return prototype_owners(part([900, 90, 9]), part([200, 200, 200]), w).metrics


def test_where_images_lie_at_random_only_the_biased_counts_favour_frequent_classes():
    rng = np.random.default_rng(0)
    runs = [imbalanced(rng, 60, knows=False) for _ in range(20)]
    mean = {name: np.mean([m[name] for m in runs]) for name in runs[0]}
    assert mean["head_share_ratio"] == pytest.approx(mean["head_share_ratio_random"], abs=0.01)
    assert mean["tail_share_ratio"] == pytest.approx(mean["tail_share_ratio_random"], abs=0.01)
    assert mean["tail_share_ratio"] < 0.1 < 1 < mean["head_share_ratio"]
    for group in ("head", "body", "tail"):
        assert mean[f"{group}_own_ratio"] == pytest.approx(1, abs=0.05)
        assert mean[f"{group}_used_per_class"] == pytest.approx(mean["head_used_per_class"], rel=0.02)


def test_of_equally_frequent_classes_none_owns_more_by_chance():
    """Few images on each prototype, so that many classes are equally common there."""
    rng, w = np.random.default_rng(0), torch.eye(60)
    labels = np.tile(np.arange(4), 30)
    images = features(labels, rng.integers(0, 60, 120), w)
    random = shares(ownership(images, images, w), labels, labels, np.arange(60)).owned_random
    assert random == pytest.approx(random.mean(), rel=0.1)


def test_where_each_class_has_prototypes_of_its_own_every_class_has_its_share():
    m = imbalanced(np.random.default_rng(0), 60, knows=True)
    assert m["tail_used_wide_per_class"] == m["tail_used_per_class"] == 20  # at right angles
    assert m["tail_own_per_class"] == m["head_own_per_class"] == 20
    assert m["head_own_ratio"] == m["tail_own_ratio"] == 1
    assert m["tail_share_ratio"] > 10  # a third of the prototypes, as far as 9 images reach
    assert m["tail_share_ratio"] > 10 * m["head_share_ratio"]


def test_a_starved_tail_shows():
    """The rare class is on one prototype, which a frequent one is on too."""
    w = torch.eye(21)
    rng = np.random.default_rng(0)

    def part(counts):
        labels = np.repeat(np.arange(3), counts)
        on = np.where(labels == 2, 0, rng.integers(0, 10, len(labels)) + 10 * (labels == 1))
        return features(labels, on, w)

    m = prototype_owners(part([900, 90, 9]), part([200, 200, 200]), w).metrics
    assert (m["head_used_per_class"], m["tail_used_per_class"], m["tail_own_per_class"]) == (10, 1, 1)
    assert m["tail_own_ratio"] == pytest.approx(1 / (20 / 3))
    assert m["tail_share_ratio"] == 0


def test_what_the_encoder_was_trained_on_says_which_classes_are_frequent():
    w = torch.eye(30)
    labels = np.tile(np.arange(3), 10)
    images = features(labels, np.arange(30), w)
    assert "head_coverage" not in prototype_owners(images, images, w).metrics
    result = prototype_owners(images, images, w, frequency=np.array([5, 500]))
    assert result.details["classes"]["train_images"] == [5, 500, 0]
    result = prototype_owners(images, images, w, frequency=np.array([5, 500, 50]))
    assert {"head_coverage", "body_coverage", "tail_coverage"} <= set(result.metrics)
    assert result.metrics["tail_share_ratio"] == 1
