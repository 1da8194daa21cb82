"""Weighted k-nearest-neighbour accuracy, DINO's protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, bootstrap95_mean
from uncollapse.measure.probes import knn_predictions

HEADLINE = 20
"""The k of the headline, fixed in advance: DINO's best on ImageNet. The best k on test would be chosen on test."""
SOURCE = "Wu et al. 2018; Caron et al. 2021 (DINO), evaluation on frozen features"


def knn(
    train: Features,
    test: Features,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Result:
    """Accuracy of test images' classes as elected by their nearest training images.

    Features are the last class tokens (or pooled maps), L2-normalised; each of the k nearest votes with weight
    ``exp(cos / temperature)``. One neighbour search serves every k. A k above the number of training images is
    left out and named, and where all are, every training image votes; a test image whose class is not in train counts
    as wrong.

    Args:
        ks: numbers of neighbours; the headline is k = 20, or the largest usable k where 20 is not among them.
        temperature: above 0.

    Returns:
        ``top1`` (the headline's k) and ``top1_kK`` for every k, in [0, 1]; bootstrap interval over test images.

    Raises:
        ValueError: no k is given or one is below 1, temperature ≤ 0, labels are missing, or features are not finite
            or all zero.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if any(k < 1 for k in ks):
        raise ValueError(f"k must be at least 1, got {list(ks)}")
    if not ks:
        raise ValueError("no k is given")
    # Where even the smallest is too large, all training images vote.
    usable = sorted({k for k in ks if k <= len(train)}) or [len(train)]
    correct = predictions(train, test, usable, temperature, device)
    _, _, truth = labelled(train, test)
    right = {k: (p.numpy() == truth) for k, p in correct.items()}
    headline = HEADLINE if HEADLINE in right else usable[-1]
    metrics = {"top1": float(right[headline].mean())}
    metrics |= {f"top1_k{k}": float(r.mean()) for k, r in right.items()}
    details: dict[str, object] = {"k": headline, "temperature": temperature, "n_train": len(train)}
    if dropped := sorted({k for k in ks if k > len(train)}):
        details["left_out"] = f"k = {', '.join(map(str, dropped))}: more than the {len(train)} training images"
    if unseen := int((~torch.isin(torch.from_numpy(truth), train.labels)).sum()):  # type: ignore[arg-type]
        details["unseen"] = f"{unseen} test images of classes that are not in train count as wrong"
    return Result(
        "knn",
        metrics,
        bootstrap95_mean(right[headline]),
        len(test),
        f"weighted kNN on L2-normalised features, k = {headline}, temperature {temperature:g}",
        SOURCE,
        details,
        {f"top1_k{k}": bootstrap95_mean(r) for k, r in right.items()},
    )


def predictions(
    train: Features, test: Features, ks: Sequence[int], temperature: float = 0.07, device: torch.device | str = "cpu"
) -> dict[int, Tensor]:
    """The elected class ``(n,)`` of every test image for each k ≤ the number of training images."""
    labelled(train, test)
    assert train.labels is not None
    elected = knn_predictions(train.last.to(device), train.labels, test.last.to(device), ks, temperature)
    return {k: classes.cpu() for k, classes in elected.items()}
