"""Groups of classes by training images: where they end, and when there are thirds at all."""

import numpy as np
import pytest

from uncollapse.measure.shots import groups, splits, thirds


def test_splits_follow_training_counts_and_their_edges():
    many, medium, few = splits(np.array([101, 100, 20, 19, 1, 0]))
    assert many.tolist() == [True, *[False] * 5]
    assert medium.tolist() == [False, True, True, False, False, False]
    assert few.tolist() == [False, False, False, True, True, False]


def test_cifar10_lt_has_thirds_and_no_few():
    of = groups(np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]))
    assert {name: int(members.sum()) for name, members in of.items()} == {
        "many": 8,
        "medium": 2,
        "few": 0,
        "head": 4,
        "body": 3,
        "tail": 3,
    }
    assert np.flatnonzero(of["tail"]).tolist() == [7, 8, 9]


def test_thirds_go_by_frequency_and_leave_out_classes_without_images():
    head, body, tail = thirds(np.array([3, 0, 100, 10, 50, 5, 4]))
    assert np.flatnonzero(head).tolist() == [2, 4]
    assert np.flatnonzero(body).tolist() == [3, 5]
    assert np.flatnonzero(tail).tolist() == [0, 6]


@pytest.mark.parametrize("counts", [[30] * 10, [183, 178, 174], [100, 10], [100, 10, 10, 10, 10, 10], [0, 0, 0]])
def test_sets_without_frequent_and_rare_classes_have_no_thirds(counts):
    assert thirds(np.array(counts)) is None
    assert set(groups(np.array(counts))) == {"many", "medium", "few"}
