"""Linear probe: a whole grid of classifiers at once, chosen on training data that was held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.measure.linear import HELD_OUT, RATES, Probe, linear_probe
from uncollapse.progress import Report

SOURCE = (
    "DINOv2's linear evaluation (Oquab et al. 2024), chosen on held-out training data as CAPI's (Darcet et al. 2025)"
)


@dataclass(frozen=True)
class Input:
    """What one group of classifiers sees."""

    layers: int
    pooled: bool

    def columns(self, features: Features) -> slice:
        """Of `side_by_side`: class tokens of the last blocks; with ``pooled``, the last mean patch token as well."""
        _, blocks, width = features.cls.shape
        return slice((blocks - self.layers) * width, (blocks + self.pooled) * width)

    def __str__(self) -> str:
        return f"{self.layers} block{'s' * (self.layers > 1)}" + (" + mean patch" if self.pooled else "")


def side_by_side(features: Features) -> Tensor:
    """``(n, F)``: class tokens of the blocks, the last one last, then the last mean patch token where there is one."""
    return torch.cat([features.cls.flatten(1), *([] if features.mean is None else [features.mean[:, -1]])], 1)


def inputs(features: Features) -> list[Input]:
    """{1, 4} last blocks × {class tokens, with the mean patch token}, as far as the encoder has them."""
    blocks = sorted({1, features.cls.shape[1]})
    return [Input(l, p) for p in ((False, True) if features.mean is not None else (False,)) for l in blocks]


def linear(
    train: Features,
    test: Features,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    probe: Probe | None = None,
) -> Result:
    """Top-1 accuracy of the best of a grid of linear classifiers on frozen features.

    `measure.linear.linear_probe` over every learning rate × number of blocks × pooling.

    Args:
        rates: learning rates for a batch of 256; scaled by batch / 256.
        report: called with (name, steps done, steps to do, loss).
        probe: what `fit_probe` returned for the same arguments, to fit nothing again.

    Returns:
        ``top1``, ``top5`` (above 5 classes) and ``macro`` (mean over test classes of their top-1), in [0, 1].

    Raises:
        ValueError: one class, one image in all, no labels, or features that are not finite or all zero.
    """
    probe = probe or fit_probe(train, test, seed, rates, device, report)
    _, _, truth = labelled(train, test)
    order = probe.scores.topk(min(5, probe.scores.shape[1]), 1)[1].numpy()
    right = order[:, 0] == truth
    metrics = {"top1": float(right.mean())}
    if probe.scores.shape[1] > 5:
        metrics["top5"] = float((order == truth[:, None]).any(1).mean())
    metrics["macro"] = float(np.mean([right[truth == c].mean() for c in np.unique(truth)]))
    names = [str(candidate) for candidate in inputs(train)]
    details: dict[str, object] = {
        "chosen": f"{names[probe.input]}, learning rate {probe.rate:g}",
        "held_out_scores": [
            {"input": names[number], "rate": rate, "accuracy": accuracy, "cross_entropy": surprise}
            for number, rate, accuracy, surprise in probe.table
        ],
        "classifiers": len(inputs(train)) * len(rates),
        "n_train": len(train),
    }
    if unseen := int((~np.isin(truth, train.labels.numpy())).sum()):  # type: ignore[union-attr]
        details["unseen"] = f"{unseen} test images of classes that are not in train count as wrong"
    protocol = f"linear probe, best of {details['classifiers']} on {HELD_OUT:.0%} of train, standardised features"
    intervals = {"macro": bootstrap95_class_means(right, truth)}
    if "top5" in metrics:
        intervals = {"top5": bootstrap95_mean((order == truth[:, None]).any(1)), **intervals}
    return Result("linear", metrics, bootstrap95_mean(right), len(test), protocol, SOURCE, details, intervals)


def fit_probe(
    train: Features,
    test: Features,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    device: torch.device | str = "cpu",
    report: Report | None = None,
) -> Probe:
    """What `linear` does up to the numbers, which see; labels of the test images are not looked at."""
    y, classes, _ = labelled(train, test)
    columns = [candidate.columns(train) for candidate in inputs(train)]

    def told(done: int, total: int, loss: float) -> None:
        if report is not None:
            report("linear", done, total, loss)

    x, unseen = side_by_side(train), side_by_side(test)
    return linear_probe(x, torch.from_numpy(y), unseen, classes, columns, seed, rates, device, told)
