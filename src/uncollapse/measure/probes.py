"""How good features are, on held-out data: nearest neighbours, a linear classifier, and an interval."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from uncollapse.measure.nearest import nearest, unit_rows, vote

_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)


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
    _check(train, train_labels, test)
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


@dataclass(frozen=True)
class LinearResult:
    """A linear probe's test accuracy and how it was reached."""

    accuracy: float
    """In [0, 1], on test."""
    C: float
    """Inverse regularisation, chosen on features held out from train."""
    n_train: int
    """Training features used, after sub-sampling to max_train."""
    converged: bool
    """Whether the final fit converged within its iterations."""
    unseen: int
    """Test features whose class is not in train; counted as errors."""
    predicted: Tensor = field(compare=False, repr=False)
    """(n,) int64 classes, on the CPU."""


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    seed: int = 0,
    max_train: int = 10_000,
    max_iter: int = 200,
) -> LinearResult:
    """Accuracy of multinomial logistic regression on frozen, standardised features.

    For the end of a training run: a convex fit, which needs no learning rate, in a tenth of the time of the grid of
    classifiers that `uncollapse evaluate` trains by the published protocol (`evaluate.tasks.linear`). That one stays
    for ImageNet-sized data. The two numbers differ, by up to 3 points on a few hundred images.

    C is chosen from 0.001 ... 10 on a fifth of *train* that is held out, stratified by class where every
    class allows it (ties to the stronger regularisation), then the classifier is refitted on all of train;
    test is only looked at once. With fewer than 10 training features nothing is held out and C is 1. Above
    max_train, a random subset (by seed) is used. A test class that is not in train is an error, and
    `LinearResult.unseen` says how many there were.

    Args:
        train: (N, d) floating. train_labels: (N,) integers. test: (n, d). test_labels: (n,).
        seed: of the subset and the split.
        max_train: most training features used. max_iter: L-BFGS iterations per fit.

    Raises:
        ValueError: shapes disagree, a feature is NaN or infinite, or train has fewer than two classes.
    """
    _check(train, train_labels, test)
    if test_labels.shape != test.shape[:1] or test_labels.is_floating_point():
        raise ValueError(f"test needs one label per row, labels integers, got {tuple(test_labels.shape)}")
    x, y = train.detach().float().cpu().numpy(), train_labels.cpu().numpy()
    if len(x) > max_train:
        chosen = np.random.default_rng(seed).permutation(len(x))[:max_train]
        x, y = x[chosen], y[chosen]
    if len(np.unique(y)) < 2:
        raise ValueError(f"the training labels hold one class, {y[0]}; a classifier needs at least two")
    best_c = _chosen_c(x, y, seed, max_iter) if len(x) >= 10 else 1.0
    scaler = StandardScaler().fit(x)
    model, converged = _fitted(scaler.transform(x), y, best_c, max_iter)
    truth = test_labels.cpu().numpy()
    predicted = model.predict(scaler.transform(test.detach().float().cpu().numpy()))
    return LinearResult(
        accuracy=float((predicted == truth).mean()),
        C=best_c,
        n_train=len(x),
        converged=converged,
        unseen=int((~np.isin(truth, y)).sum()),
        predicted=torch.from_numpy(predicted.astype(np.int64)),
    )


def _chosen_c(x: np.ndarray, y: np.ndarray, seed: int, max_iter: int) -> float:
    fit, check = held_out(y, max(len(x) // 5, 1), seed)
    if not len(check):
        return 1.0
    scaler = StandardScaler().fit(x[fit])
    inside, outside = scaler.transform(x[fit]), scaler.transform(x[check])
    models = [_fitted(inside, y[fit], c, max_iter)[0] for c in _GRID]
    scores = [float((model.predict(outside) == y[check]).mean()) for model in models]
    return _GRID[int(np.argmax(scores))]


def _fitted(x: np.ndarray, y: np.ndarray, c: float, max_iter: int) -> tuple[LogisticRegression, bool]:
    with warnings.catch_warnings():
        # Reported in the result instead: on separable features the optimum runs away and hardly matters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One image per class is a normal few-shot task.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model = LogisticRegression(C=c, max_iter=max_iter).fit(x, y)
    return model, bool(model.n_iter_.max() < max_iter)


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


def _check(train: Tensor, train_labels: Tensor, test: Tensor) -> None:
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
