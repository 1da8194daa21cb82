"""Clusters against classes: the prototypes as they are, and k-means of the features beside them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from uncollapse.evaluate.features import Features, Ints, labelled
from uncollapse.evaluate.result import Result
from uncollapse.measure.geometry import entropy
from uncollapse.measure.usage import prototype_argmax

RESTARTS = 10
"""k-means starts this often; the start with the smallest sum of squares on the training features is kept."""
WHOLE = 1 << 30
"""Largest n · k · d for k-means on everything at once; above it mini-batches."""
DRAWS = 100
"""Half-samples behind the intervals."""


def cluster(train: Features, test: Features, vectors: Tensor | None = None, seed: int = 0) -> Result:
    """How well clusters of the test images agree with their classes, without any classifier.

    Clusters are (a) the prototypes: argmax of the raw cosine, as in the unsupervised-classes table of iBOT (Zhou
    et al., 2022), and (b) k-means with one cluster per training class, fitted on the L2-normalised training
    features (last block) and only applied to the test images. Of each: AMI (Vinh et al., 2010), NMI (arithmetic
    mean), ARI and FMI, all of scikit-learn; the accuracy after the best one-to-one matching of clusters to
    classes (Hungarian method), where images of unmatched clusters are errors; and the purity, where every cluster
    stands for its commonest class.

    AMI leads because it is corrected for chance: NMI and purity grow with the number of clusters whatever they
    hold, and one-to-one accuracy falls, as at most one cluster per class can be right.

    Args:
        train: N images with labels. test: n images with labels, of at least two classes.
        vectors: (K, D) prototypes. With `projections` in ``test`` they are task (a), else only (b) is done.
        seed: of k-means and of the interval.

    Returns:
        The headline is ``prototypes_ami``, or ``kmeans_ami`` without prototypes. AMI and ARI lie in [-1, 1], the
        others in [0, 1]; ``n_*_used`` counts the clusters that any test image is in.

    Raises:
        ValueError: no labels, no image, fewer training images than classes, non-finite or zero features, or
            test images of one class.
    """
    labels, _, truth = labelled(train, test)
    if len(np.unique(truth)) < 2:
        raise ValueError("the test images are all of one class, so there is nothing for clusters to tell apart")
    k = len(np.unique(labels))
    clusters: dict[str, Ints] = {}
    notes: dict[str, Any] = {"classes": len(np.unique(truth)), "k": k}
    if vectors is not None and test.projections is not None:
        clusters["prototypes"] = prototype_argmax(test.projections, vectors.to(test.projections.device)).numpy()
        notes["prototypes"] = len(vectors)
    elif vectors is not None:
        notes["left_out"] = "prototypes: the encoder has no head that leads into their space"
    clusters["kmeans"], how = kmeans(train.last, test.last, k, seed)
    metrics: dict[str, float] = {}
    for name, assigned in clusters.items():
        metrics |= {f"{name}_{metric}": value for metric, value in agreement(assigned, truth).items()}
    metrics |= {f"n_{name}_used": float(len(np.unique(assigned))) for name, assigned in clusters.items()}
    headline = next(iter(clusters))
    intervals = {
        f"{name}_{metric}": ends
        for name, assigned in clusters.items()
        for metric, ends in agreement_intervals(assigned, truth, seed=seed).items()
    }
    several = len(np.unique(clusters[headline])) > notes["classes"]
    notes["rules"] = [
        "AMI leads: it is corrected for chance, while NMI and purity rise with the number of clusters",
        "accuracy matches each class to at most one cluster; images of clusters left over count as errors"
        + (", of which there must be some here" if several else ""),
        "purity lets every cluster stand for its commonest class among the same test images",
        "intervals: ± 1.96 standard deviations over half-samples without replacement, because twins of one image in a "
        "bootstrap sample agree on cluster and class and would raise agreement",
    ]
    return Result(
        "cluster",
        metrics,
        intervals[f"{headline}_ami"],
        len(truth),
        f"{'argmax of the raw cosine; ' if 'prototypes' in clusters else ''}{how}",
        "unsupervised classes of iBOT (Zhou et al., 2022); AMI: Vinh et al., 2010",
        notes,
        intervals,
    )


def kmeans(train: Tensor, test: Tensor, k: int, seed: int = 0) -> tuple[Ints, str]:
    """The cluster of each test image, (n,) int64 in [0, k), and how it was found. Fitted on ``train`` alone.

    Args:
        train: (N, d) features, N >= k. test: (n, d). Rows are L2-normalised here.

    Raises:
        ValueError: fewer training images than clusters.
    """
    if len(train) < k:
        raise ValueError(f"k-means needs at least as many training images as clusters, got {len(train)} for {k}")
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    x, y = F.normalize(train.float(), dim=1).numpy(), F.normalize(test.float(), dim=1).numpy()
    whole = x.size * k <= WHOLE
    if whole:
        model = KMeans(k, n_init=RESTARTS, random_state=seed)
    else:
        model = MiniBatchKMeans(k, n_init=RESTARTS, random_state=seed, batch_size=max(4096, 4 * k))
    with warnings.catch_warnings():
        # Features that coincide fill fewer clusters; how many hold test images is among the metrics.
        warnings.simplefilter("ignore", ConvergenceWarning)
        assigned = model.fit(x).predict(y)
    kind = "k-means" if whole else "mini-batch k-means"
    return assigned.astype(np.int64), f"{kind}, k = {k}, {RESTARTS} starts, on normalised training features"


# ------------------------------------------------------------------------------------------------- agreement


def agreement(clusters: Ints, truth: Ints) -> dict[str, float]:
    """AMI, NMI, ARI, FMI, one-to-one accuracy and purity.

    Args:
        clusters, truth: (n,) integers, n >= 1, of any range.
    """
    from sklearn.metrics import adjusted_rand_score, fowlkes_mallows_score, normalized_mutual_info_score

    table = Table.of(clusters, truth)
    return {
        "ami": table.ami(),
        "nmi": float(normalized_mutual_info_score(truth, clusters)),
        "ari": float(adjusted_rand_score(truth, clusters)),
        "fmi": float(fowlkes_mallows_score(truth, clusters)),
        "accuracy": matched_accuracy(clusters, truth),
        "purity": table.purity(),
    }


def matched_accuracy(clusters: Ints, truth: Ints) -> float:
    """Share of images that are right under the best one-to-one matching of clusters to classes, in [0, 1].

    Whichever there are more of, clusters or classes, some stay unmatched, and their images are errors.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    table = Table.of(clusters, truth)
    rows, columns = len(table.classes), len(table.sizes)
    # A sparse table, since used prototypes times classes can be billions. A private cluster for each class, worth
    # nothing, makes a full matching exist; one is added to every edge because zeros are not stored.
    extra = np.arange(rows)
    weights = np.concatenate([table.counts + 1, np.ones(rows, np.int64)])
    at = np.concatenate([table.column, extra]), np.concatenate([table.row, columns + extra])
    graph = coo_array((weights, at), shape=(rows, columns + rows)).tocsr()
    left, right = min_weight_full_bipartite_matching(graph, maximize=True)
    return float(graph[left, right].sum() - rows) / len(truth)


@dataclass(frozen=True)
class Table:
    """A contingency table as the list of its cells that are not empty."""

    row: Ints
    """(m,) cluster of each cell, renumbered from 0."""
    column: Ints
    """(m,) class of each cell, renumbered from 0."""
    counts: Ints
    """(m,) images in each cell."""
    sizes: Ints
    """Images of each cluster."""
    classes: Ints
    """Images of each class."""

    @classmethod
    def of(cls, clusters: Ints, truth: Ints) -> Table:
        _, row = np.unique(clusters, return_inverse=True)
        _, column = np.unique(truth, return_inverse=True)
        width = int(column.max()) + 1
        cells, counts = np.unique(row * width + column, return_counts=True)
        return cls(cells // width, cells % width, counts, np.bincount(row), np.bincount(column))

    def purity(self) -> float:
        largest = np.zeros(len(self.sizes), np.int64)
        np.maximum.at(largest, self.row, self.counts)
        return float(largest.sum() / self.counts.sum())

    def ami(self) -> float:
        """Adjusted mutual information, arithmetic mean of the entropies; scikit-learn's number, much faster where

        there are many clusters, because clusters of one size share their term of the expectation.
        """
        n = int(self.counts.sum())
        if len(self.sizes) == len(self.classes) == 1 or len(self.sizes) == len(self.classes) == n:
            return 1.0
        inside = n * self.counts / (self.sizes[self.row] * self.classes[self.column])
        information = float((self.counts / n * np.log(inside)).sum())
        chance = expected_information(self.sizes, self.classes)
        room = (entropy(self.sizes) + entropy(self.classes)) / 2 - chance
        room = math.copysign(max(abs(room), float(np.finfo(np.float64).eps)), room)
        return float((information - chance) / room)


def expected_information(sizes: Ints, classes: Ints) -> float:
    """Mean mutual information (nats) of tables with these margins when images are shuffled (Vinh et al., 2010)."""
    n = int(sizes.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    a_all, a_times = np.unique(sizes, return_counts=True)
    total = 0.0
    for b, times in zip(*np.unique(classes, return_counts=True), strict=True):
        first = np.maximum(1, a_all + b - n)
        length = np.minimum(a_all, b) - first + 1
        start = np.cumsum(length) - length
        a = np.repeat(a_all, length)
        cell = np.arange(length.sum()) - np.repeat(start - first, length)
        log_p = (
            log_factorial[a]
            + log_factorial[n - a]
            + log_factorial[b]
            + log_factorial[n - b]
            - log_factorial[n]
            - log_factorial[cell]
            - log_factorial[a - cell]
            - log_factorial[b - cell]
            - log_factorial[n - a - b + cell]
        )
        terms = cell / n * np.log(n * cell / (a * b)) * np.exp(log_p)
        total += float(times * (np.repeat(a_times, length) * terms).sum())
    return total


def agreement_intervals(
    clusters: Ints, truth: Ints, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of `agreement` over the choice of test images: delete-half jackknife (Shao & Wu, 1989).

    The standard deviation over random halves is that of the whole for a smooth statistic. A bootstrap would draw
    some images twice; twins share cluster and class, which reads as agreement that is not there.

    Returns:
        For each metric, within its range; (nan, nan) with fewer than four images.
    """
    n, whole = len(truth), agreement(clusters, truth)
    if n < 4:
        return dict.fromkeys(whole, (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    halves = [agreement(clusters[half], truth[half]) for half in (rng.permutation(n)[: n // 2] for _ in range(draws))]
    intervals = {}
    for name, middle in whole.items():
        half = 1.96 * float(np.std([one[name] for one in halves]))
        intervals[name] = middle - half if name in ("ami", "ari") else max(0.0, middle - half), min(1.0, middle + half)
    return intervals
