"""How good features are, on held-out data: nearest neighbours, and an interval. The linear probe is `linear`."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import StratifiedShuffleSplit
from torch import Tensor

from uncollapse.measure.nearest import nearest, unit_rows, vote


def knn_predictions(
    train: Tensor, train_labels: Tensor, test: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> dict[int, Tensor]:
    """Classes that DINO's weighted k-nearest-neighbour classifier gives (Caron et al., 2021; Wu et al., 2018).

    Features are L2-normalised; each of the k nearest training features votes for its class with weight
    exp(cos / temperature); equal votes go to the smaller label. One search serves every k.

    Args:
        train: (N, d) floating. train_labels: (N,) integers.
        test: (n, d) floating, on the same device.
        ks: numbers of neighbours, each in [1, N].
        temperature: > 0.

    Returns:
        For each k the (n,) labels, on the device of ``train``.

    Raises:
        ValueError: shapes disagree, a feature is NaN, infinite or all zero, a k > N, or temperature <= 0.
    """
    check_features(train, train_labels, test)
    if not ks or not all(1 <= k <= len(train) for k in ks):
        raise ValueError(f"k is {list(ks)} but there are {len(train)} training features; choose k in [1, {len(train)}]")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    similarity, index = nearest(unit_rows(train, "train"), unit_rows(test, "test"), max(ks))
    labels = train_labels.to(train.device)[index]
    return {k: vote(similarity[:, :k], labels[:, :k], temperature) for k in ks}


def held_out(y: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and ``count`` to choose on, stratified where every class has two members and room for it.

    Otherwise random, with the first member of every class among those to fit on; none are left to choose on where every
    one is the first of its class.
    """
    classes, members = np.unique(y, return_counts=True)
    if members.min() >= 2 and len(classes) <= count <= len(y) - len(classes):
        fit, check = next(StratifiedShuffleSplit(1, test_size=count, random_state=seed).split(y, y))
        return fit, check
    order = np.random.default_rng(seed).permutation(len(y))
    first = order[np.unique(y[order], return_index=True)[1]]
    check = order[~np.isin(order, first)][:count]
    return np.setdiff1d(order, check), check


def confidence95(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for an accuracy measured on n independent test images.

    Covers the sampling of the test images only, not of training seeds. Both ends lie in [0, 1].

    Raises:
        ValueError: accuracy outside [0, 1] or n < 1.
    """
    if not 0 <= accuracy <= 1 or n < 1:
        raise ValueError(f"need an accuracy in [0, 1] and n >= 1, got {accuracy} and {n}")
    z2 = 1.959963984540054**2
    centre = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (accuracy * (1 - accuracy) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def check_features(train: Tensor, train_labels: Tensor, test: Tensor) -> None:
    """Raises :class:`ValueError` for features and labels that no classifier can be made of."""
    if train_labels.shape != train.shape[:1] or train_labels.is_floating_point():
        raise ValueError(
            f"train needs one label per row, and labels integers, got features {tuple(train.shape)} and labels "
            f"{tuple(train_labels.shape)} of {train_labels.dtype}"
        )
    for name, x in (("train", train), ("test", test)):
        if x.ndim != 2 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"{name} must be non-empty floating (rows, d) features, got {x.dtype} of shape {tuple(x.shape)}"
            )
        if bad := int((~torch.isfinite(x).all(1)).sum()):
            raise ValueError(f"{bad} of the {len(x)} {name} features are NaN or infinite; look upstream for the cause")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train has {train.shape[1]} dimensions and test {test.shape[1]}; use one encoder for both")
