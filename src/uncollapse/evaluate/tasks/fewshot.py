"""Few-shot classification on frozen features, MSN's low-shot protocol."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, spread95

PENALTY = 0.00025
"""λ of MSN's evaluation: weight of the squared L2 norm, divided by the number of training images."""
ITERATIONS = 5000
SOURCE = "MSN's low-shot evaluation (Assran et al. 2022): L2 logistic regression without intercept"


def fewshot(
    train: Features, test: Features, shots: Sequence[int] = (1, 2, 5, 10), draws: int = 5, seed: int = 0
) -> Result:
    """Accuracy from a few training images per class: mean and spread over several draws of them.

    Each feature is centred by its own mean and L2-normalised, then classified by multinomial logistic regression
    with penalty λ/n and no intercept. A class with fewer images than shots gives all it has, and is counted in
    the details; draws are nested (5 shots contain the 2) and keyed by the seed.

    Args:
        shots: images per class. draws: at least 2, for the spread.

    Returns:
        ``top1_Sshot`` and ``std_Sshot`` (standard deviation over draws) for each; the headline is the first of
        ``shots``, its interval Student's over draws.

    Raises:
        ValueError: shots below 1, draws below 2, one class, labels missing, or features not finite or all zero.
    """
    if not shots or min(shots) < 1 or draws < 2:
        raise ValueError(f"need shots of at least 1 and at least 2 draws, got {list(shots)} and {draws}")
    y, _, truth = labelled(train, test)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError("the training images are all of one class; a classifier needs at least two")
    x, queries = _prepared(train.last), _prepared(test.last)
    accuracies: dict[int, list[float]] = {s: [] for s in shots}
    stopped = 0
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        order = {c: rng.permutation(np.flatnonzero(y == c)) for c in classes}
        for s in shots:
            rows = np.concatenate([order[c][:s] for c in classes])
            model = _fit(x[rows], y[rows])
            stopped += int(model.n_iter_.max() >= ITERATIONS)
            accuracies[s].append(float((model.predict(queries) == truth).mean()))
    metrics: dict[str, float] = {}
    for s, values in accuracies.items():
        metrics[f"top1_{s}shot"] = float(np.mean(values))
        metrics[f"std_{s}shot"] = float(np.std(values, ddof=1))
    details: dict[str, object] = {
        "draws": draws,
        "values": {f"{s}shot": v for s, v in accuracies.items()},
        "classes": len(classes),
    }
    short = {f"{s}shot": int((counts < s).sum()) for s in shots if (counts < s).any()}
    if stopped:
        details["unconverged"] = f"{stopped} of {draws * len(accuracies)} fits stopped at {ITERATIONS} iterations"
    if short:
        details["classes_with_fewer_images"] = short
    if unseen := int((~np.isin(truth, classes)).sum()):
        details["unseen"] = f"{unseen} test images of classes that are not in train count as wrong"
    protocol = f"logistic regression, λ = {PENALTY:g}/n, {draws} draws"
    intervals = {f"top1_{s}shot": spread95(v) for s, v in accuracies.items()}
    return Result("fewshot", metrics, spread95(accuracies[shots[0]]), len(test), protocol, SOURCE, details, intervals)


def _prepared(x: Tensor) -> np.ndarray:
    centred = x.float() - x.float().mean(1, keepdim=True)
    out: np.ndarray = (centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)).double().numpy()
    return out


def _fit(x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted by the caller
        # One image per class is the normal case here.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        # scikit-learn minimises C Σ loss + |w|²/2; mean loss + λ/n |w|²/2 is that with C = 1/λ. With so little
        # penalty its default tolerance stops a tenth above the minimum, which costs points of accuracy.
        return LogisticRegression(C=1 / PENALTY, fit_intercept=False, tol=1e-8, max_iter=ITERATIONS).fit(x, y)
