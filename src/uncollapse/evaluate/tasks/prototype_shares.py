"""How prototypes are divided among classes: frequent ones against rare ones, and against what chance would give."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uncollapse.evaluate.features import Ints
from uncollapse.evaluate.tasks.ownership import Floats, Ownership
from uncollapse.measure.shots import THIRDS, groups

FEWEST = 5
"""Test images that a class needs before it is counted which prototypes they use."""
SHUFFLES = 20
"""Random assignments of the labels, behind the number of prototypes that a class would own by chance."""


@dataclass(frozen=True)
class Shares:
    """What each class has of the distinct prototypes: ε-duplicates count as one, by the ε of the ownership."""

    owned: Floats
    """(C,) on which most training images are its own; classes with equally many share a prototype."""
    owned_random: Floats
    """(C,) the same where training images had their labels at random; frequent classes own most by chance alone."""
    images: int
    """Test images that are looked at of each class for the rest, the same number of every class; 0: too few."""
    used: Floats
    """(C,) on which such an image is; NaN for classes with fewer images."""
    used_wide: Floats
    """The same where prototypes closer than `WIDE` count as one."""
    own: Floats
    """(C,) on which most of these images are its own, shared as ``owned``. By chance every class has as many, whatever
    its training images. NaN as for ``used``."""


def shares(o: Ownership, labels: Ints, truth: Ints, wide: Ints, seed: int = 0) -> Shares:
    """Counts the distinct prototypes of each class.

    Args:
        labels: (N,) classes of the training images. truth: (n,) of the test images.
        wide: (K,) index of the prototype that each one merges into at `WIDE`.
        seed: of the random labels, and of which test images of a class are looked at where it has more.
    """
    rng = np.random.default_rng(seed)
    k, classes = len(o.group), len(o.class_train)
    cluster = o.group[o.train_argmax]
    owned = _on(cluster, labels, k, classes)[1]
    random = np.zeros(classes)
    for _ in range(SHUFFLES):
        random += _on(cluster, rng.permutation(labels), k, classes)[1]
    rows, enough, images = _equally_many(truth, o.class_train > 0, rng)
    used, own = _on(o.group[o.argmax[rows]], truth[rows], k, classes)
    used_wide = _on(wide[o.argmax[rows]], truth[rows], k, classes)[0]
    for counts in (used, used_wide, own):
        counts[~enough] = math.nan
    return Shares(owned, random / SHUFFLES, images, used, used_wide, own)


def _on(cluster: Ints, labels: Ints, k: int, classes: int) -> tuple[Floats, Floats]:
    """(C,) clusters that each class is on, and those of which it is the commonest, in equal parts where several are.

    Ownership gives such a cluster to the first of them; where classes are numbered by size that favours frequent ones.
    """
    cells, n = np.unique(cluster * classes + labels, return_counts=True)
    where, what = cells // classes, cells % classes
    most = np.zeros(k, np.int64)
    np.maximum.at(most, where, n)
    leads = n == most[where]
    parts = np.bincount(where[leads], minlength=k)
    commonest = np.zeros(classes)
    np.add.at(commonest, what[leads], 1 / parts[where[leads]])
    return np.bincount(what, minlength=classes).astype(np.float64), commonest


def _equally_many(
    truth: Ints, there: NDArray[np.bool_], rng: np.random.Generator
) -> tuple[Ints, NDArray[np.bool_], int]:
    """Test images at random, as many of each class that has enough; (C,) which those are, and how many images."""
    counts = np.bincount(truth, minlength=len(there))
    enough = (counts >= FEWEST) & there
    images = int(counts[enough].min()) if enough.any() else 0
    order = rng.permutation(len(truth))
    order = order[np.argsort(truth[order], kind="stable")]
    place = np.arange(len(truth)) - (np.cumsum(counts) - counts)[truth[order]]  # of each image within its class
    return order[(place < images) & enough[truth[order]]], enough, images


def by_group(o: Ownership, s: Shares, truth: Ints, right: NDArray[np.bool_], frequency: Ints) -> dict[str, float]:
    """The metrics of each group of classes, as `prototype_owners` describes them.

    Args:
        right: (n,) whether a test image's prototype names its class. frequency: (C,) images that order the classes.
    """
    owned, distinct, total = o.owned(), o.owned_distinct(), np.bincount(truth, minlength=len(o.class_train))
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(truth[right], minlength=len(total)) / total
    metrics: dict[str, float] = {}
    of = {name: of_class for name, of_class in groups(frequency).items() if of_class.any()}
    compared = [name for name in of if name in THIRDS] or list(of)
    for name, of_class in of.items():
        metrics[f"{name}_coverage"] = float((owned[of_class] > 0).mean())
        metrics[f"{name}_prototypes_per_class"] = float(owned[of_class].mean())
        metrics[f"{name}_distinct_per_class"] = float(distinct[of_class].mean())
        metrics[f"{name}_top1"] = _mean(accuracy[of_class & (total > 0)])
        if name in compared:
            metrics[f"{name}_used_per_class"] = _mean(s.used[of_class])
            metrics[f"{name}_used_wide_per_class"] = _mean(s.used_wide[of_class])
            metrics[f"{name}_own_per_class"] = _mean(s.own[of_class])
        if name in compared and len(compared) > 1:
            metrics[f"{name}_own_ratio"] = _mean(s.own[of_class]) / _mean(s.own)
            metrics[f"{name}_share_ratio"] = _share_ratio(s.owned, o.class_train, of_class)
            metrics[f"{name}_share_ratio_random"] = _share_ratio(s.owned_random, o.class_train, of_class)
    return metrics


def _share_ratio(prototypes: Floats, images: Ints, of_class: NDArray[np.bool_]) -> float:
    """Share of the prototypes by share of the images."""
    image_share = float(images[of_class].sum() / images.sum())
    return float(prototypes[of_class].sum() / prototypes.sum()) / image_share if image_share else math.nan


def _mean(values: Floats) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan
