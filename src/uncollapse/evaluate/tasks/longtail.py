"""Accuracy on frequent and on rare classes: with many, a medium number of, and few training images, and by thirds."""

from __future__ import annotations

import numpy as np
import torch

from uncollapse.evaluate.features import Features, Ints, labelled
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.evaluate.tasks import knn as neighbours
from uncollapse.evaluate.tasks.linear import fit_probe
from uncollapse.measure.linear import Probe
from uncollapse.measure.shots import CUTS, groups, padded

SOURCE = (
    "Liu et al. 2019 (OLTR): many above 100 training images, few below 20, medium between; Jiang et al. 2021 (SDCLR): "
    "thirds of the classes"
)


def longtail(
    train: Features,
    test: Features,
    seed: int = 0,
    cuts: tuple[int, int] = CUTS,
    device: torch.device | str = "cpu",
    probe: Probe | None = None,
    frequency: Ints | None = None,
) -> Result:
    """Top-1 by the number of training images of the class, for kNN (k = 20) and for the linear probe.

    A class with more than ``cuts[0]`` training images is *many*, with fewer than ``cuts[1]`` *few*, and *medium*
    otherwise (both limits included). Where training images are imbalanced, the third of the classes with the most is
    the *head*, the one with the fewest the *tail*, the rest the *body* (`uncollapse.measure.shots.thirds`). A group's
    accuracy is the mean over its test images; ``macro`` is the mean over classes. A group without test images has no
    metric and is named in the details; test classes that are not in train count as wrong in the overall numbers and
    belong to no group.

    Args:
        probe: what `fit_probe` returned for the same features and seed, to fit nothing again.
        frequency: (C,) images of each class that the encoder was trained on, where ``train`` has others: it groups the
            classes. None: those of ``train``.

    Returns:
        ``macro`` (linear probe; the headline), then ``linear_*`` and ``knn_*`` for overall, macro, many, medium
        and few, and head, body and tail.

    Raises:
        ValueError: as `linear`, or cuts that do not fall.
    """
    if not cuts[0] >= cuts[1] >= 0:
        raise ValueError(f"cuts must fall, such as (100, 20), got {cuts}")
    y, classes, truth = labelled(train, test)
    counts = np.bincount(y, minlength=classes)
    frequency = counts if frequency is None else padded(frequency, classes)
    k = min(neighbours.HEADLINE, len(train))
    guesses = {
        "linear": (probe or fit_probe(train, test, seed, device=device)).scores.argmax(1).numpy(),
        "knn": neighbours.predictions(train, test, [k], device=device)[k].numpy(),
    }
    splits = groups(frequency, cuts)
    total = np.bincount(truth, minlength=classes)
    of_class: dict[str, list[float]] = {}
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name, guess in guesses.items():
        right = guess == truth
        with np.errstate(invalid="ignore"):
            of_class[name] = (np.bincount(truth[right], minlength=classes) / total).tolist()
        metrics[f"{name}_overall"] = float(right.mean())
        intervals[f"{name}_overall"] = bootstrap95_mean(right)
        metrics[f"{name}_macro"] = float(np.mean([right[truth == c].mean() for c in np.unique(truth)]))
        intervals[f"{name}_macro"] = bootstrap95_class_means(right, truth)
        for split, members in splits.items():
            if members[truth].any():
                metrics[f"{name}_{split}"] = float(right[members[truth]].mean())
                intervals[f"{name}_{split}"] = bootstrap95_mean(right[members[truth]])
    details: dict[str, object] = {
        "classes": {split: int(members.sum()) for split, members in splits.items()},
        "test_images": {split: int(members[truth].sum()) for split, members in splits.items()},
        "train_images_per_class": {"largest": int(frequency.max()), "smallest": int(frequency[frequency > 0].min())},
        "by_class": {"train_images": frequency.tolist(), "test_images": total.tolist(), **of_class},
    }
    if empty := [split for split, members in splits.items() if not members[truth].any()]:
        details["without_test_images"] = empty
    if unseen := int((counts[truth] == 0).sum()):
        details["unseen"] = f"{unseen} test images of classes that are not in train count as wrong"
    metrics = {"macro": metrics["linear_macro"], **metrics}
    thirds = "; head, body, tail: thirds of the classes by training images" if "head" in splits else ""
    protocol = f"many > {cuts[0]}, few < {cuts[1]} training images{thirds}; linear probe, and kNN with k = {k}"
    return Result("longtail", metrics, intervals["linear_macro"], len(test), protocol, SOURCE, details, intervals)
