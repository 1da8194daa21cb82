"""Retrieval by class: how early the training images of a test image's class come when all are ranked by cosine."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.numerics import rows_at_once

Floats = NDArray[np.float64]
Found = dict[str, Floats]
"""Per query: ``ap``, ``ap_top``, ``recall_1``, ``recall_10``; NaN where no training image is relevant."""


def retrieval(train: Features, test: Features, top: int = 100, device: torch.device | str = "cpu") -> Result:
    """Mean average precision of the whole ranking of the training images, for each test image as the query.

    Relevant are the training images of the query's class. Average precision is that of scikit-learn and
    TREC, over the full ranking and not interpolated. Training images with equal cosines share the last rank of
    their group, so that no order of the files can help; recall is its mean over the orders of a group.

    Args:
        train: N labelled images, the bank. test: n labelled images, the queries. Their last features are used,
            L2-normalised.
        top: ``map_at_{top}`` looks at so many first ranks; it divides by the relevant images that could be there,
            min(top, relevant).
        device: of the ranking.

    Returns:
        ``map`` over the queries, ``map_per_class`` (the mean over test classes of their mean), ``map_chance`` (what
        a random order has), ``map_at_{top}``, and ``recall_at_1`` and ``_10``: the share of queries with a
        relevant image among the first. All in [0, 1]. Queries without relevant images are left out, and counted
        in the details.

    Raises:
        ValueError: no labels, no images, non-finite or zero features, top < 1, or no query with a relevant image.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    bank_labels, total, labels = labelled(train, test)
    relevant = np.bincount(bank_labels, minlength=total)
    asked = relevant[labels] > 0
    if not asked.any():
        raise ValueError("no test image has a training image of its class, so there is nothing to retrieve")
    per_query = average_precisions(train.last, bank_labels, test.last, labels, top, device)
    per_query = {name: values[asked] for name, values in per_query.items()}
    classes, codes = np.unique(labels[asked], return_inverse=True)
    per_class = np.bincount(codes, weights=per_query["ap"]) / np.bincount(codes)
    metrics = {
        "map": float(per_query["ap"].mean()),
        f"map_at_{top}": float(per_query["ap_top"].mean()),
        "recall_at_1": float(per_query["recall_1"].mean()),
        "recall_at_10": float(per_query["recall_10"].mean()),
        "map_per_class": float(per_class.mean()),
        "map_chance": float(np.mean(chance(relevant, len(train))[labels[asked]])),
    }
    details = {
        "bank": len(train),
        "queries_without_relevant": int((~asked).sum()),
        "map_of_class": {_name(test, int(c)): round(float(v), 6) for c, v in zip(classes, per_class, strict=True)},
        "rules": ["queries without a training image of their class are left out", "equal cosines share the last rank"],
    }
    return Result(
        "retrieval",
        metrics,
        bootstrap95_mean(per_query["ap"]),
        int(asked.sum()),
        f"cosine ranking of {len(train)} training images, full-depth average precision",
        "average precision over the full ranking, as in TREC and scikit-learn",
        details,
        {
            f"map_at_{top}": bootstrap95_mean(per_query["ap_top"]),
            "recall_at_1": bootstrap95_mean(per_query["recall_1"]),
            "recall_at_10": bootstrap95_mean(per_query["recall_10"]),
            "map_per_class": bootstrap95_class_means(per_query["ap"], codes),
        },
    )


def average_precisions(
    bank: Tensor,
    bank_labels: NDArray[np.int64],
    queries: Tensor,
    labels: NDArray[np.int64],
    top: int = 100,
    device: torch.device | str = "cpu",
) -> Found:
    """Per query (n,), float64: ``ap``, ``ap_top`` and the two recalls; NaN where nothing is relevant.

    Only the ranks of relevant images are needed, and those follow from the sorted cosines without knowing which
    image each belongs to: numbers sort an order of magnitude faster than an argsort does.

    Args:
        bank: (N, d) features, bank_labels (N,). queries: (n, d), labels (n,). Finite rows that are not zero.
    """
    order = np.argsort(bank_labels, kind="stable")  # the relevant images of a query are then one slice
    start = np.searchsorted(bank_labels[order], np.arange(int(max(labels.max(), bank_labels.max())) + 2))
    keys = F.normalize(bank.float()[torch.from_numpy(order)], dim=1, eps=0.0).to(device)
    asked = np.argsort(labels, kind="stable")
    out = np.full((len(queries), 5), math.nan)
    chunk = rows_at_once(len(keys), least=16)
    scratch = torch.empty(min(chunk, len(queries)), len(keys), device=keys.device)
    for which in (asked[i : i + chunk] for i in range(0, len(asked), chunk)):
        block = F.normalize(queries[torch.from_numpy(which)].float(), dim=1, eps=0.0).to(device)
        cosines = torch.mm(block, keys.T, out=scratch[: len(block)])
        classes, first = np.unique(labels[which], return_index=True)
        rows = [slice(a, b) for a, b in itertools.pairwise([*first.tolist(), len(which)])]
        own_class = [_sort(cosines[r, start[c] : start[c + 1]].clone()) for c, r in zip(classes, rows, strict=True)]
        cosines = _sort(cosines)
        for r, relevant in zip(rows, own_class, strict=True):
            if relevant.shape[1]:
                out[which[r]] = _of_ranks(relevant, cosines[r], top).cpu().numpy()
    ap, ap_top, *best = out.T
    return {"ap": ap, "ap_top": ap_top, "recall_1": _hit(1, *best), "recall_10": _hit(10, *best)}


def _sort(x: Tensor) -> Tensor:
    """Rows in ascending order, in place on the CPU, where numpy's sort of floats is vectorised."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    x.numpy().sort(axis=1)
    return x


def _of_ranks(own_class: Tensor, every: Tensor, top: int) -> Tensor:
    """Five float64 numbers of each query, (q, 5), from its ascending cosines.

    They are the average precision, the same of the first ``top`` ranks, and for the best relevant image how many images
    lie above it, how many are tied with it, and how many of those are relevant.

    Args:
        own_class: (q, r) cosines with the relevant images.
        every: (q, N) cosines with all images.
    """
    relevant, total = own_class.shape[1], every.shape[1]
    # As many as there are with a cosine at least as large: the last rank of each group of ties.
    rank = (total - torch.searchsorted(every, own_class)).double()
    hits = (relevant - torch.searchsorted(own_class, own_class)).double()
    precision = hits / rank
    cut = (precision * (rank <= top)).sum(1) / min(relevant, top)
    above = (total - torch.searchsorted(every, own_class[:, -1:].contiguous(), right=True)).squeeze(1).double()
    return torch.stack([precision.mean(1), cut, above, rank[:, -1] - above, hits[:, -1]], 1)


def _hit(places: int, above: Floats, tied: Floats, tied_relevant: Floats) -> Floats:
    """Chance that one of ``mine`` among ``tied`` images, in random order behind ``above`` others, is in the first

    ``places``; all (n,).
    """
    missed = np.where(np.isnan(above), math.nan, 1.0)
    for i in range(places):
        one_more = np.clip(tied - tied_relevant - i, 0, None) / np.clip(tied - i, 1, None)
        missed = np.where(places - above > i, missed * one_more, missed)
    return 1 - missed


def chance(relevant: NDArray[np.int64], total: int) -> Floats:
    """Expected average precision of a random order of ``total`` images of which ``relevant`` count, elementwise."""
    r = relevant.astype(np.float64)
    harmonic = float((1 / np.arange(1, total + 1)).sum())
    others = (r - 1) / max(total - 1, 1)
    return np.asarray(harmonic / total + others * (1 - harmonic / total))


def _name(features: Features, label: int) -> str:
    return features.classes[label] if label < len(features.classes) else str(label)
