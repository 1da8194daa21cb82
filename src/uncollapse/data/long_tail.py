"""A long tail cut from a balanced set of images: the benchmark CIFAR-10-LT and its kind, from any labelled set."""

from __future__ import annotations

import math

import numpy as np

from uncollapse.errors import DataError

BALANCED = 2.0
"""A long tail is cut from a set whose head would keep more than one in so many images of its largest class."""


def cut_long_tail(index: np.ndarray, labels: np.ndarray | None, factor: float, where: str, why: str = "") -> np.ndarray:
    """Those of the images at ``index`` that a long tail of them keeps, in their order; all for a factor of 1.

    Args:
        index: (n,) positions in ``labels``. labels: of the whole set; None: it has none.
        factor: as `long_tail_rows` takes it. where: the set's name, for errors. why: there are no labels.

    Raises:
        DataError: no labels, or a long tail that cannot be drawn; names the set.
    """
    if factor == 1:
        return index
    if labels is None:
        raise DataError(
            f"{where}: a long tail is cut by class, but these images have no labels{f' ({why})' if why else ''}; "
            "give labelled images, or leave the imbalance factor at 1"
        )
    try:
        return index[long_tail_rows(labels[index], factor)]
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def long_tail_rows(labels: np.ndarray, factor: float) -> np.ndarray:
    """Sorted positions in ``labels`` (n,) that make up a long tail: the exponential profile of Cui et al. (2019).

    In the form and the class order of Cao et al. (2019, LDAM): of C classes, in the order of their numbers, class c
    keeps ⌊m·factor^(-c/(C-1))⌋ images. m is the largest for which every class has enough; where that is less than half
    of the largest class, the set is not balanced enough. Which images of a class are kept depends on the labels alone,
    and those for a larger factor lie in those for a smaller one.

    Args:
        factor: largest by smallest class, at least 1.

    Raises:
        DataError: ``factor`` is below 1, or labels are too uneven or too few for it.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise DataError(f"long tail: the imbalance factor is largest by smallest class, at least 1, got {factor:g}")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise DataError("long tail: at least two classes are needed")
    share = factor ** (-np.arange(len(classes)) / (len(classes) - 1))
    head = int(np.min((counts + 1 - 1e-6) / share))  # the largest with ⌊head·share⌋ ≤ counts
    if head * BALANCED < counts.max():
        raise DataError(
            f"long tail: with imbalance factor {factor:g} the first class could keep {head} images, less "
            f"than half of the largest class ({counts.max()}): the set is not balanced enough"
        )
    keep = np.floor(head * share + 1e-9).astype(int)
    if keep.min() < 1:
        raise DataError(
            f"long tail: with imbalance factor {factor:g} and {head} images in the first class the last "
            f"would keep none; the factor can be {head} at most"
        )
    rng = np.random.default_rng(0)
    rows = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in zip(classes, keep, strict=True)]
    return np.sort(np.concatenate(rows))
