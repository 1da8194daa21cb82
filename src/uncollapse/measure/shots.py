"""Classes by how many training images they have: by counts, as the long-tailed literature has it, and by thirds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
SPLITS = ("many", "medium", "few")
THIRDS = ("head", "body", "tail")
CUTS = (100, 20)
IMBALANCED = 2.0
"""A set is called imbalanced where its largest class has more than so many times the images of its smallest."""


def is_imbalanced(counts: Sequence[int] | Ints) -> bool:
    """``counts``: images of each class that has any."""
    return len(counts) > 0 and max(counts) > IMBALANCED * min(counts)


def splits(class_train: Ints, cuts: tuple[int, int] = CUTS) -> tuple[Mask, Mask, Mask]:
    """Classes with many (> 100), medium (20 to 100) and few (1 to 19) training images: three (C,) masks.

    The counts are those of Liu et al. (2019), and absolute: a small set has no classes with many, and one whose
    smallest class has 50 images (CIFAR-10-LT) none with few.
    """
    return (
        class_train > cuts[0],
        (class_train >= cuts[1]) & (class_train <= cuts[0]) & (class_train > 0),
        (class_train < cuts[1]) & (class_train > 0),
    )


def thirds(class_train: Ints) -> tuple[Mask, Mask, Mask] | None:
    """The third of the classes with the most training images, the middle one, and that with the fewest: (C,) masks.

    What three cannot divide goes to the first ones, as in Jiang et al. (2021, SDCLR): 10 classes are 4, 3 and 3. None
    where the set is not imbalanced, or a class of the head is as small as one of the tail.
    """
    there = np.flatnonzero(class_train > 0)
    order = there[np.argsort(-class_train[there], kind="stable")]
    if len(order) < 3 or not is_imbalanced(class_train[order]):
        return None
    head, body, tail = np.array_split(order, 3)
    if class_train[head].min() <= class_train[tail].max():
        return None
    places = np.arange(len(class_train))
    return np.isin(places, head), np.isin(places, body), np.isin(places, tail)


def padded(class_train: Ints, classes: int) -> Ints:
    """With zeros for classes that only other images have."""
    return np.pad(class_train, (0, max(0, classes - len(class_train))))


def groups(class_train: Ints, cuts: tuple[int, int] = CUTS) -> dict[str, Mask]:
    """`splits` by name, empty ones too, and `thirds` where there are any: head, body and tail."""
    by_count = dict(zip(SPLITS, splits(class_train, cuts), strict=True))
    return by_count | dict(zip(THIRDS, thirds(class_train) or (), strict=False))
