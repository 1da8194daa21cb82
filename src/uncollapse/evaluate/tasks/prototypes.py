"""Which class each prototype stands for: purity, coverage of the classes, and what duplicates are worth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from uncollapse.evaluate.features import Features, Ints
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.evaluate.tasks.ownership import Floats, Ownership, majority, ownership
from uncollapse.evaluate.tasks.prototype_shares import Shares, by_group, shares
from uncollapse.measure.probes import confidence95
from uncollapse.measure.shots import groups, padded
from uncollapse.measure.sweep import WIDE
from uncollapse.measure.unique import greedy_cover, nearest_kept

FEWEST = 5
"""Held-out images that a prototype needs before its own purity and entropy are looked at."""
SHUFFLES = 20
"""Random assignments with the same group sizes, behind the purity of chance."""


def prototype_owners(
    train: Features,
    test: Features,
    vectors: torch.Tensor,
    eps: float = 0.025,
    seed: int = 0,
    frequency: Ints | None = None,
) -> Result:
    """What the prototypes know about classes, and what collapse costs.

    The headline is a classifier without training: each prototype stands for the commonest class among the
    training images assigned to it (argmax of the raw cosine), and a test image gets the class of its prototype.
    Prototypes without training images predict nothing, which counts as an error.

    Args:
        train: N images with labels and projections. test: n such. vectors: (K, D) prototypes.
        eps: prototypes closer than this cosine distance are duplicates. seed: of the shuffles.
        frequency: (C,) images of each class that the encoder was trained on, where ``train`` has others: it decides
            which classes are frequent. None: those of ``train``.

    Returns:
        Shares in [0, 1] unless said otherwise: ``top1`` and ``top1_merged`` (ε-duplicates put together);
        ``top1_commonest``, always answering the largest training class; ``coverage``, classes with training images
        that own a prototype, and ``coverage_test``, classes with test images of which one is on a prototype of its
        class; ``purity`` of the test images (each prototype's commonest class, weighted by usage) with
        ``purity_random``, the same of random groups of the same sizes; ``class_entropy_bits``, what is left to
        learn about the class once the prototype is known; ``n_used`` and ``n_owned``, numbers of prototypes;
        ``duplicates_top1`` and ``distinct_top1``, of the test images on prototypes in groups of duplicates and on
        those alone, with ``duplicates_usage``, the share of images on the former. Then for each of the
        `uncollapse.measure.shots.groups` of classes (many, medium, few; head, body, tail where training images are
        imbalanced) ``*_coverage``, ``*_prototypes_per_class`` and ``*_distinct_per_class`` (owned, means; the latter
        and what follows count duplicates as one) and ``*_top1`` (mean over its classes); for each of the thirds, or of
        the others where there are none, ``*_used_per_class``, on which equally many test images of each class are,
        ``*_used_wide_per_class``, the same at ε = 0.25, and ``*_own_per_class``, on which most of these are of the
        class; ``*_own_ratio``, the latter by its mean over all classes, 1 by chance; and ``*_share_ratio``, the group's
        share of the owned ones by its share of the training images, with ``*_share_ratio_random``, that of random
        labels. NaN where nothing is there to measure.

    Raises:
        ValueError: as `ownership`.
    """
    o = ownership(train, test, vectors, eps)
    assert train.labels is not None
    assert test.labels is not None
    truth = test.labels.numpy()
    wide = nearest_kept(vectors.detach().float().cpu(), greedy_cover(vectors.detach().float().cpu(), WIDE)).numpy()
    s = shares(o, train.labels.numpy(), truth, wide, seed)
    frequency = o.class_train if frequency is None else padded(frequency, len(o.class_train))
    right = o.owner[o.argmax] == truth
    right_merged = o.merged_owner[o.argmax] == truth
    in_train, in_test = o.class_train > 0, np.bincount(truth, minlength=len(o.class_train)) > 0
    owned = o.owned()
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
    metrics |= by_group(o, s, truth, right, frequency)
    return Result(
        "prototypes",
        metrics,
        bootstrap95_mean(right.astype(np.float64)),
        len(truth),
        f"owner: commonest class of {len(train)} training images by raw cosine argmax, K = {len(o.owner)}, "
        f"duplicates at ε = {eps:g}; used by {s.images} test images of each class",
        "ours; duplicates as in partial prototype collapse (Govindarajan et al., 2024), splits of Liu et al., 2019",
        _details(o, s, test, truth, right, frequency, seed),
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
                for name, of_class in groups(frequency).items()
                if (chosen := of_class[truth]).any()
            },
        },
    )


def _details(
    o: Ownership, s: Shares, test: Features, truth: Ints, right: NDArray[np.bool_], frequency: Ints, seed: int
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
            "names": [test.classes[c] if c < len(test.classes) else str(c) for c in range(len(frequency))],
            "train_images": frequency.tolist(),
            "prototypes": o.owned().tolist(),
            "distinct": o.owned_distinct().tolist(),
            "owned": s.owned.tolist(),
            "owned_random": s.owned_random.tolist(),
            "used": s.used.tolist(),
            "used_wide": s.used_wide.tolist(),
            "own": s.own.tolist(),
        },
        "rules": [
            "test images on a prototype without training images count as errors",
            f"per-prototype means take prototypes with at least {FEWEST} test images; weighted ones take all",
            "purity and entropy are of the test images themselves: few images per prototype flatter both, which is "
            "what purity_random shows; top1 has no such bias",
            "exact copies never share images: equal cosines go to the first of them",
            "frequent classes own most prototypes by chance alone (share_ratio_random); among equally many test images "
            "of each class none has an advantage (used, own)",
            "classes with equally many images on a prototype share it in own and share_ratio; else the first owns it",
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


def _random_purity(cluster: Ints, truth: Ints, seed: int) -> float:
    rng = np.random.default_rng(seed)
    k, classes = int(cluster.max()) + 1, int(truth.max()) + 1
    draws = [majority(cluster, rng.permutation(truth), k, classes)[1].sum() for _ in range(SHUFFLES)]
    return float(np.mean(draws)) / len(truth)


def _weighted(values: Floats, counts: Ints) -> float:
    there = counts > 0
    return float((values[there] * counts[there]).sum() / counts[there].sum()) if there.any() else math.nan


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
