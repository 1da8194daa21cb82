"""Which class each prototype stands for: purity, coverage of the classes, and what duplicates are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uncollapse.evaluate.features import Features, Ints, labelled
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.measure.probes import confidence95
from uncollapse.measure.shots import SPLITS, splits
from uncollapse.measure.unique import greedy_cover, nearest_kept
from uncollapse.measure.usage import prototype_argmax

Floats = NDArray[np.float64]

FEWEST = 5
"""Held-out images that a prototype needs before its own purity and entropy are looked at."""
SHUFFLES = 20
"""Random assignments with the same group sizes, behind the purity of chance."""


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

    @property
    def duplicated(self) -> NDArray[np.bool_]:
        """(K,) whether a prototype shares its group with another."""
        return np.bincount(self.group, minlength=len(self.group))[self.group] > 1

    def owned(self) -> Ints:
        """(C,) prototypes that each class owns."""
        return np.bincount(self.owner[self.owner >= 0], minlength=len(self.class_train))

    def owned_distinct(self) -> Ints:
        """(C,) groups that each class owns after merging."""
        leaders = np.flatnonzero(self.group == np.arange(len(self.group)))
        owner = self.merged_owner[leaders]
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
    _, largest, entropy = _majority(theirs, truth, k, classes)
    counts = np.bincount(theirs, minlength=k)
    with np.errstate(invalid="ignore"):
        purity = largest / counts
    return Ownership(
        _majority(nearest, labels, k, classes)[0],
        group,
        np.bincount(nearest, minlength=k),
        counts,
        purity,
        entropy,
        _majority(group[nearest], labels, k, classes)[0][group],
        theirs,
        np.bincount(labels, minlength=classes),
    )


def _majority(cluster: Ints, labels: Ints, k: int, classes: int) -> tuple[Ints, Ints, Floats]:
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


def prototype_owners(
    train: Features, test: Features, vectors: torch.Tensor, eps: float = 0.025, seed: int = 0
) -> Result:
    """What the prototypes know about classes, and what collapse costs.

    The headline is a classifier without training: each prototype stands for the commonest class among the
    training images assigned to it (argmax of the raw cosine), and a test image gets the class of its prototype.
    Prototypes without training images predict nothing, which counts as an error.

    Args:
        train: N images with labels and projections. test: n such. vectors: (K, D) prototypes.
        eps: prototypes closer than this cosine distance are duplicates. seed: of the shuffles.

    Returns:
        Shares in [0, 1] unless said otherwise: ``top1`` and ``top1_merged`` (ε-duplicates put together);
        ``top1_commonest``, always answering the largest training class; ``coverage``, classes with training images
        that own a prototype, and ``coverage_test``, classes with test images of which one is on a prototype of its
        class; ``purity`` of the test images (each prototype's commonest class, weighted by usage) with
        ``purity_random``, the same of random groups of the same sizes; ``class_entropy_bits``, what is left to
        learn about the class once the prototype is known; ``n_used`` and ``n_owned``, numbers of prototypes;
        ``duplicates_top1`` and ``distinct_top1``, of the test images on prototypes in groups of duplicates and on
        those alone, with ``duplicates_usage``, the share of images on the former; and for each split by training
        images per class (many > 100, medium 20 to 100, few < 20; Liu et al., 2019) ``*_coverage``,
        ``*_prototypes_per_class`` and ``*_distinct_per_class`` (owned, means) and ``*_top1`` (mean over its
        classes). NaN where nothing is there to measure.

    Raises:
        ValueError: as `ownership`.
    """
    o = ownership(train, test, vectors, eps)
    assert test.labels is not None
    truth = test.labels.numpy()
    right = o.owner[o.argmax] == truth
    right_merged = o.merged_owner[o.argmax] == truth
    in_train, in_test = o.class_train > 0, np.bincount(truth, minlength=len(o.class_train)) > 0
    owned, distinct = o.owned(), o.owned_distinct()
    hit = np.bincount(truth[right], minlength=len(in_test)) > 0
    random = _random_purity(o.argmax, truth, seed)
    on_copy = o.duplicated[o.argmax]
    metrics = {
        "top1": float(right.mean()),
        "coverage": float((owned[in_train] > 0).mean()),
        "purity": _weighted(o.purity, o.test_counts),
        "purity_random": random,
        "duplicates_top1": _mean(right[on_copy]),
        "distinct_top1": _mean(right[~on_copy]),
        "duplicates_usage": float(on_copy.mean()),
        "top1_merged": float(right_merged.mean()),
        "top1_commonest": float((truth == o.class_train.argmax()).mean()),
        "coverage_test": float(hit[in_test].mean()),
        "class_entropy_bits": _weighted(o.entropy, o.test_counts),
        "n_used": float((o.test_counts > 0).sum()),
        "n_owned": float((o.owner >= 0).sum()),
    }
    metrics |= _by_split(o, truth, right, owned, distinct)
    return Result(
        "prototypes",
        metrics,
        bootstrap95_mean(right.astype(np.float64)),
        len(truth),
        f"owner: commonest class of {len(train)} training images by raw cosine argmax, K = {len(o.owner)}, "
        f"duplicates at ε = {eps:g}",
        "ours; duplicates as in partial prototype collapse (Govindarajan et al., 2024), splits of Liu et al., 2019",
        _details(o, test, truth, right, owned, distinct, seed),
        {
            "top1_merged": bootstrap95_mean(right_merged),
            "duplicates_usage": bootstrap95_mean(on_copy),
            "top1_commonest": bootstrap95_mean(truth == o.class_train.argmax()),
            **{
                name: bootstrap95_mean(right[chosen])
                for name, chosen in (("duplicates_top1", on_copy), ("distinct_top1", ~on_copy))
                if chosen.any()
            },
            **{
                f"{name}_top1": bootstrap95_class_means(right[chosen], truth[chosen])
                for name, of_class in zip(SPLITS, splits(o.class_train), strict=True)
                if (chosen := of_class[truth]).any()
            },
        },
    )


def _details(
    o: Ownership, test: Features, truth: Ints, right: NDArray[np.bool_], owned: Ints, distinct: Ints, seed: int
) -> dict[str, Any]:
    enough = o.test_counts >= FEWEST
    unowned = int((o.owner[o.argmax] < 0).sum())
    return {
        "prototypes": len(o.owner),
        "groups": len(np.unique(o.group)),
        "without_training_images": int((o.owner < 0).sum()),
        "test_images_on_those": unowned,
        "duplicates": _quality(o, o.duplicated, truth, right, seed),
        "distinct": _quality(o, ~o.duplicated, truth, right, seed),
        "prototypes_with_enough": {
            "fewest": FEWEST,
            "n": int(enough.sum()),
            "purity": _mean(o.purity[enough]),
            "class_entropy_bits": _mean(o.entropy[enough]),
        },
        "classes": {
            "names": [test.classes[c] if c < len(test.classes) else str(c) for c in range(len(owned))],
            "train_images": o.class_train.tolist(),
            "prototypes": owned.tolist(),
            "distinct": distinct.tolist(),
        },
        "rules": [
            "test images on a prototype without training images count as errors",
            f"per-prototype means take prototypes with at least {FEWEST} test images; weighted ones take all",
            "purity and entropy are of the test images themselves: few images per prototype flatter both, which is "
            "what purity_random shows; top1 has no such bias",
            "exact copies never share images: equal cosines go to the first of them",
        ],
    }


def _quality(
    o: Ownership, which: NDArray[np.bool_], truth: Ints, right: NDArray[np.bool_], seed: int
) -> dict[str, Any]:
    """Numbers of some of the prototypes, and of the test images on them."""
    inside = which[o.argmax]
    used, n = which & (o.test_counts > 0), int(inside.sum())
    top1 = _mean(right[inside])
    return {
        "prototypes": int(which.sum()),
        "used": int(used.sum()),
        "images": n,
        "images_per_used": n / int(used.sum()) if n else math.nan,
        "top1": top1,
        "top1_ci95": list(confidence95(top1, n)) if n else [math.nan, math.nan],
        "purity": _weighted(o.purity[used], o.test_counts[used]),
        "purity_random": _random_purity(o.argmax[inside], truth[inside], seed) if n else math.nan,
        "class_entropy_bits": _weighted(o.entropy[used], o.test_counts[used]),
    }


def _by_split(o: Ownership, truth: Ints, right: NDArray[np.bool_], owned: Ints, distinct: Ints) -> dict[str, float]:
    total = np.bincount(truth, minlength=len(owned))
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(truth[right], minlength=len(owned)) / total
    metrics: dict[str, float] = {}
    for name, of_class in zip(SPLITS, splits(o.class_train), strict=True):
        if of_class.any():
            metrics[f"{name}_coverage"] = float((owned[of_class] > 0).mean())
            metrics[f"{name}_prototypes_per_class"] = float(owned[of_class].mean())
            metrics[f"{name}_distinct_per_class"] = float(distinct[of_class].mean())
            metrics[f"{name}_top1"] = _mean(accuracy[of_class & (total > 0)])
    return metrics


def _random_purity(cluster: Ints, truth: Ints, seed: int) -> float:
    rng = np.random.default_rng(seed)
    k, classes = int(cluster.max()) + 1, int(truth.max()) + 1
    draws = [_majority(cluster, rng.permutation(truth), k, classes)[1].sum() for _ in range(SHUFFLES)]
    return float(np.mean(draws)) / len(truth)


def _weighted(values: Floats, counts: Ints) -> float:
    there = counts > 0
    return float((values[there] * counts[there]).sum() / counts[there].sum()) if there.any() else math.nan


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
