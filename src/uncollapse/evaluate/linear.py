"""Linear probe: a whole grid of classifiers at once, chosen on training data that was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedShuffleSplit
from torch import Tensor
from torch.nn.functional import cross_entropy

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, bootstrap95_mean

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""13 learning rates at batch 256, in steps of 1-2-5. DINOv2's grid, one decade up: features are standardised and
small sets get fewer steps than its 12,500."""
HELD_OUT = 0.1
EPOCHS, LEAST_STEPS = 10, 1000
SOURCE = (
    "DINOv2's linear evaluation (Oquab et al. 2024), chosen on held-out training data as CAPI's (Darcet et al. 2025)"
)


@dataclass(frozen=True)
class Probe:
    """The classifier that the grid's scores chose, fitted again on all of train."""

    chosen: Input
    rate: float
    table: list[dict[str, object]]
    """Every classifier of the grid with its accuracy and cross-entropy on held-out training images."""
    scores: Tensor
    """(n, classes), of the test images."""


@dataclass(frozen=True)
class Input:
    """What one group of classifiers sees."""

    layers: int
    pooled: bool

    def of(self, features: Features) -> Tensor:
        """``(n, layers · d)`` class tokens of the last blocks; with ``pooled``, the last mean patch token as well."""
        parts = [features.cls[:, -self.layers :].flatten(1)]
        if self.pooled:
            assert features.mean is not None
            parts.append(features.mean[:, -1])
        return torch.cat(parts, 1)

    def __str__(self) -> str:
        return f"{self.layers} block{'s' * (self.layers > 1)}" + (" + mean patch" if self.pooled else "")


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
    report: Callable[[str, int, int, float], None] | None = None,
    probe: Probe | None = None,
) -> Result:
    """Top-1 accuracy of the best of a grid of linear classifiers on frozen features.

    Every learning rate × number of blocks × pooling is trained at once: SGD with momentum 0.9, no weight decay,
    batches of 256 (1,024 above 50,000 images), cosine decay, 10 epochs but at least 1,000 steps. Features are
    standardised by the mean and deviation of the images that the classifier is fitted on. The grid is fitted on
    90 % of train and scored on the other 10 %, stratified by class; the most accurate (ties: the lowest
    cross-entropy there) is fitted again on all of train, and only that one sees the test images.

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
    details: dict[str, object] = {
        "chosen": f"{probe.chosen}, learning rate {probe.rate:g}",
        "held_out_scores": probe.table,
        "classifiers": len(inputs(train)) * len(rates),
        "n_train": len(train),
    }
    if unseen := int((~np.isin(truth, train.labels.numpy())).sum()):  # type: ignore[union-attr]
        details["unseen"] = f"{unseen} test images of classes that are not in train count as wrong"
    protocol = f"linear probe, best of {details['classifiers']} on {HELD_OUT:.0%} of train, standardised features"
    return Result("linear", metrics, bootstrap95_mean(right), len(test), protocol, SOURCE, details)


def fit_probe(
    train: Features, test: Features, seed: int = 0, rates: Sequence[float] = RATES,
    device: torch.device | str = "cpu", report: Callable[[str, int, int, float], None] | None = None,
) -> Probe:  # fmt: skip
    """What `linear` does up to the numbers, which see; labels of the test images are not looked at."""
    y, classes, _ = labelled(train, test)
    if len(np.unique(y)) < 2:
        raise ValueError("the training images are all of one class; a classifier needs at least two")
    labels = torch.from_numpy(y)
    fit, check = split(y, HELD_OUT, seed)
    candidates = inputs(train)
    work = sum(steps_for(len(fit))[1] for _ in candidates) + steps_for(len(y))[1]
    done = 0

    def told(steps: int, loss: float) -> None:
        if report is not None:
            report("linear", done + steps, work, loss)

    table: list[dict[str, object]] = []
    ranks: list[tuple[float, float]] = []
    for candidate in candidates:
        x = candidate.of(train)
        grid = _train(x[fit], labels[fit], x[check], classes, rates, seed, device, told)
        done += steps_for(len(fit))[1]
        accuracy = (grid.argmax(2) == labels[check]).double().mean(1)
        # A rate at which training ran away scores nothing.
        ran_away = ~torch.isfinite(grid).all(2).all(1)
        accuracy[ran_away] = 0
        surprise = torch.stack([cross_entropy(scores, labels[check]) for scores in grid])
        surprise[ran_away] = torch.inf
        ranks += zip(accuracy.tolist(), (-surprise).tolist(), strict=True)
        table += [
            {"input": str(candidate), "rate": r, "accuracy": a, "cross_entropy": -e}
            for r, (a, e) in zip(rates, ranks[-len(rates) :], strict=True)
        ]
    winner = max(range(len(ranks)), key=ranks.__getitem__)
    best, rate = candidates[winner // len(rates)], rates[winner % len(rates)]
    scores = _train(best.of(train), labels, best.of(test), classes, [rate], seed, device, told)[0]
    return Probe(best, rate, table, scores)


def split(y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and indices held out, stratified where every class has two images and room for it.

    Otherwise random, with the first image of every class among those to fit on.

    Raises:
        ValueError: fewer images than classes + 1, so that nothing can be held out.
    """
    classes, counts = np.unique(y, return_counts=True)
    held = max(1, round(share * len(y)))
    if counts.min() >= 2 and len(classes) <= held <= len(y) - len(classes):
        fit, check = next(StratifiedShuffleSplit(1, test_size=held, random_state=seed).split(y, y))
        return np.sort(fit), np.sort(check)
    order = np.random.default_rng(seed).permutation(len(y))
    first = order[np.unique(y[order], return_index=True)[1]]
    free = order[~np.isin(order, first)]
    if not len(free):
        raise ValueError(
            f"{len(y)} training images of {len(classes)} classes: one of each leaves none to choose the learning "
            "rate on; use the fewshot task"
        )
    check = free[:held]
    return np.setdiff1d(order, check), np.sort(check)


def steps_for(n: int) -> tuple[int, int]:
    """Batch size and number of steps for n images."""
    batch = min(n, 256 if n <= 50_000 else 1024)
    return batch, max(LEAST_STEPS, math.ceil(EPOCHS * n / batch))


def _train(
    x: Tensor, y: Tensor, unseen: Tensor, classes: int, rates: Sequence[float], seed: int,
    device: torch.device | str, told: Callable[[int, float], None],
) -> Tensor:  # fmt: skip
    """Scores ``(rates, m, classes)`` of the images ``unseen (m, d)`` under one classifier for every rate.

    All classifiers share one product with the batch forward and one backward: their weights stand side by side.
    """
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation.clamp_min(1e-30), torch.zeros(()))
    x, y = ((x - mean) * scale).to(device), y.to(device)
    batch, steps = steps_for(len(x))
    many, width = len(rates), x.shape[1]
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(1, classes, width, generator=generator)
    weight = start.repeat(many, 1, 1).to(device)  # every rate from one start
    bias = torch.zeros(many, classes, device=device)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    lr = torch.tensor(rates, device=device) * batch / 256
    order, at = torch.randperm(len(x), generator=generator), 0
    for step in range(steps):
        if at + batch > len(x):
            order, at = torch.randperm(len(x), generator=generator), 0
        rows = order[at : at + batch].to(device)
        at += batch
        images, truth = x[rows], y[rows]
        logits = torch.addmm(bias.view(-1), images, weight.view(-1, width).T).view(batch, many, classes)
        error = torch.softmax(logits, 2)
        if step % 50 == 0 or step == steps - 1:
            told(step + 1, float(-error[torch.arange(batch), :, truth].clamp_min(1e-30).log().amin(1).mean()))
        error[torch.arange(batch, device=error.device), :, truth] -= 1
        error = error.view(batch, -1).div_(batch)
        speed_w.mul_(0.9).add_((error.T @ images).view_as(weight))
        speed_b.mul_(0.9).add_(error.sum(0).view_as(bias))
        now = lr * (0.5 * (1 + math.cos(math.pi * step / steps)))
        weight.addcmul_(speed_w, now.view(-1, 1, 1), value=-1)
        bias.addcmul_(speed_b, now.view(-1, 1), value=-1)
    unseen = ((unseen - mean) * scale).to(device)
    out = torch.addmm(bias.view(-1), unseen, weight.view(-1, width).T).view(len(unseen), many, classes)
    return out.transpose(0, 1).cpu()
