"""Which prototype each image is assigned to, and which class owns each prototype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from uncollapse.evaluate.features import Features, Ints, labelled
from uncollapse.measure.unique import greedy_cover, nearest_kept
from uncollapse.measure.usage import prototype_argmax

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ownership:
    """Prototypes against classes, all by the argmax of the raw cosine. A class owns a prototype if it is the

    commonest one among the *training* images there (ties: the lowest class); test images only judge that.
    """

    owner: Ints
    """(K,) class, or -1 where no training image is assigned."""
    group: Ints
    """(K,) index of the kept prototype (greedy ε-cover) that each one merges into."""
    train_counts: Ints
    """(K,) training images assigned."""
    test_counts: Ints
    """(K,) test images assigned."""
    purity: Floats
    """(K,) share of the commonest class among the test images assigned; NaN where there is none."""
    entropy: Floats
    """(K,) entropy of the class in bits among them (plug-in: few images make it small); NaN where there is none."""
    merged_owner: Ints
    """(K,) as `owner`, after all images of a group are put together."""
    argmax: Ints
    """(n,) the prototype of each test image."""
    class_train: Ints
    """(C,) training images of each class."""
    train_argmax: Ints
    """(N,) the prototype of each training image."""

    @property
    def duplicated(self) -> NDArray[np.bool_]:
        """(K,) whether a prototype shares its group with another."""
        return np.bincount(self.group, minlength=len(self.group))[self.group] > 1

    @property
    def kept(self) -> Ints:
        """The prototypes that the others merge into, one a group."""
        return np.flatnonzero(self.group == np.arange(len(self.group)))

    def owned(self) -> Ints:
        """(C,) prototypes that each class owns."""
        return np.bincount(self.owner[self.owner >= 0], minlength=len(self.class_train))

    def owned_distinct(self) -> Ints:
        """(C,) groups that each class owns after merging."""
        owner = self.merged_owner[self.kept]
        return np.bincount(owner[owner >= 0], minlength=len(self.class_train))


def ownership(train: Features, test: Features, vectors: torch.Tensor, eps: float = 0.025) -> Ownership:
    """Assigns both parts to the prototypes and says who owns what.

    Args:
        train, test: with labels and projections. vectors: (K, D) prototypes. eps: cosine distance in (0, 2].

    Raises:
        ValueError: as `labelled`; no projections, other widths, zero or non-finite rows, eps out of range.
    """
    labels, classes, truth = labelled(train, test)
    if train.projections is None or test.projections is None:
        raise ValueError("no projections: the encoder has no head that leads into the prototypes' space")
    w = vectors.detach().float().cpu()
    k = len(w)
    group = nearest_kept(w, greedy_cover(w, eps)).numpy()
    nearest = prototype_argmax(train.projections, w).numpy()
    theirs = prototype_argmax(test.projections, w).numpy()
    _, largest, entropy = majority(theirs, truth, k, classes)
    counts = np.bincount(theirs, minlength=k)
    with np.errstate(invalid="ignore"):
        purity = largest / counts
    return Ownership(
        majority(nearest, labels, k, classes)[0],
        group,
        np.bincount(nearest, minlength=k),
        counts,
        purity,
        entropy,
        majority(group[nearest], labels, k, classes)[0][group],
        theirs,
        np.bincount(labels, minlength=classes),
        nearest,
    )


def majority(cluster: Ints, labels: Ints, k: int, classes: int) -> tuple[Ints, Ints, Floats]:
    """Of each of k clusters: its commonest class (-1: empty), how many it has of that, entropy in bits (NaN: empty)."""
    # Only the cells that hold an image: 65,536 prototypes times 8,142 classes would be half a billion.
    cells, counts = np.unique(cluster * classes + labels, return_counts=True)
    where, what = cells // classes, cells % classes
    order = np.lexsort((what, -counts, where))
    filled, first = np.unique(where[order], return_index=True)
    owner, largest = np.full(k, -1), np.zeros(k, np.int64)
    owner[filled], largest[filled] = what[order][first], counts[order][first]
    share = counts / np.bincount(cluster, minlength=k)[where]
    entropy = np.full(k, math.nan)
    entropy[filled] = np.bincount(where, weights=-share * np.log2(share), minlength=k)[filled] + 0.0
    return owner, largest, entropy
