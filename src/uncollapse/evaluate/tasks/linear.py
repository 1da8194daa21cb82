"""Linear probe: a whole grid of classifiers at once, chosen on training data that was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from uncollapse.evaluate.features import Features, labelled
from uncollapse.evaluate.result import Result, bootstrap95_class_means, bootstrap95_mean
from uncollapse.measure.probes import held_out
from uncollapse.progress import Report

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""13 learning rates at batch 256, in steps of 1-2-5. DINOv2's grid, one decade up: features are standardised and
small sets get fewer steps than its 12,500."""
HELD_OUT = 0.1
_NOTHING = 1e-20
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

    Every learning rate × number of blocks × pooling is trained at once, on the same batches: SGD with momentum 0.9,
    no weight decay, batches of 256 (1,024 above 50,000 images), cosine decay, 10 epochs but at least 1,000 steps.
    Features are standardised by the mean and deviation of the images that the classifier is fitted on. The grid is
    fitted on 90 % of train and scored on the other 10 %, stratified by class; the most accurate (ties: the lowest
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
    if len(np.unique(y)) < 2:
        raise ValueError("the training images are all of one class; a classifier needs at least two")
    labels = torch.from_numpy(y)
    fit, check = split(y, HELD_OUT, seed)
    candidates = inputs(train)
    first, second = steps_for(len(fit))[1], steps_for(len(y))[1]

    def told(steps: int, loss: float) -> None:
        if report is not None:
            report("linear", steps, first + second, loss)

    x = side_by_side(train)
    groups = [(candidate.columns(train), rates) for candidate in candidates]
    grids = _train(x[fit], labels[fit], x[check], classes, groups, seed, device, told)
    table: list[dict[str, object]] = []
    ranks: list[tuple[float, float]] = []
    for candidate, grid in zip(candidates, grids, strict=True):
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
    columns = best.columns(train)
    x, unseen = x[:, columns], side_by_side(test)[:, columns]
    (scores,) = _train(
        x, labels, unseen, classes, [(slice(None), [rate])], seed, device, lambda done, loss: told(first + done, loss)
    )
    return Probe(best, rate, table, scores[0])


def split(y: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit on and indices held out, as `held_out` chooses them, each ascending.

    Raises:
        ValueError: fewer images than classes + 1, so that nothing can be held out.
    """
    fit, check = held_out(y, max(1, round(share * len(y))), seed)
    if not len(check):
        raise ValueError(
            f"{len(y)} training images of {len(np.unique(y))} classes: one of each leaves none to choose the learning "
            "rate on; use the fewshot task"
        )
    return np.sort(fit), np.sort(check)


def steps_for(n: int) -> tuple[int, int]:
    """Batch size and number of steps for n images."""
    batch = min(n, 256 if n <= 50_000 else 1024)
    return batch, max(LEAST_STEPS, math.ceil(EPOCHS * n / batch))


def _train(
    x: Tensor,
    y: Tensor,
    unseen: Tensor,
    classes: int,
    groups: Sequence[tuple[slice, Sequence[float]]],
    seed: int,
    device: torch.device | str,
    told: Callable[[int, float], None],
) -> list[Tensor]:
    """Scores ``(rates, m, classes)`` of the images ``unseen (m, F)``, one classifier a rate, for each group.

    A group is the columns that it sees and its learning rates. All see the same batches; those of a group share one
    product with it forward and one backward: their weights stand side by side.
    """
    mean = x.mean(0)
    x = x - mean
    # torch.std of columns takes ten times as long.
    deviation = torch.stack([part.square().sum(0) for part in x.split(4096)]).sum(0).div_(len(x)).sqrt_()
    scale = torch.where(deviation > 1e-6 * (1 + mean.abs()), 1 / deviation.clamp_min(1e-30), torch.zeros(()))
    x, y = x.mul_(scale).to(device), y.to(device)
    batch, steps = steps_for(len(x))
    generator = torch.Generator().manual_seed(seed)
    grids = [_Grid(x[:, c].shape[1], classes, rates, batch, generator, x.device) for c, rates in groups]
    order, at = torch.randperm(len(x), generator=generator), 0
    for step in range(steps):
        if at + batch > len(x):
            order, at = torch.randperm(len(x), generator=generator), 0
        rows = order[at : at + batch].to(device)
        at += batch
        images, truth = x[rows], y[rows]
        asked = step % 50 == 0 or step == steps - 1
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        losses = [
            grid.step(images[:, columns], truth, decay, asked) for grid, (columns, _) in zip(grids, groups, strict=True)
        ]
        if asked:
            told(step + 1, min(losses))
    unseen = ((unseen - mean) * scale).to(device)
    return [
        grid.scores(unseen[:, columns]).transpose(0, 1).cpu() for grid, (columns, _) in zip(grids, groups, strict=True)
    ]


class _Grid:
    """Classifiers of the same input, one for each learning rate, trained by SGD with momentum 0.9."""

    def __init__(
        self,
        width: int,
        classes: int,
        rates: Sequence[float],
        batch: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.shape = len(rates), classes
        start = 0.01 * torch.randn(1, classes, width, generator=generator)
        self.weight = start.repeat(len(rates), 1, 1).to(device)  # every rate from one start
        self.bias = torch.zeros(len(rates), classes, device=device)
        self.speed_w, self.speed_b = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.lr = torch.tensor(rates, device=device) * batch / 256

    def scores(self, x: Tensor) -> Tensor:
        """``(n, rates, classes)``."""
        return torch.addmm(self.bias.view(-1), x, self.weight.flatten(0, 1).T).view(len(x), *self.shape)

    def step(self, x: Tensor, truth: Tensor, decay: float, asked: bool) -> float:
        """One step on a batch; its smallest loss where that is asked for."""
        here = torch.arange(len(x), device=x.device)
        # Without what is too small to matter: products of subnormal numbers take a CPU many times as long.
        error = torch.threshold_(torch.softmax(self.scores(x), 2), _NOTHING, 0.0)
        loss = float(-error[here, :, truth].clamp_min(1e-30).log().amin(1).mean()) if asked else math.nan
        error[here, :, truth] -= 1
        error = error.view(len(x), -1).div_(len(x))
        self.speed_w.flatten(0, 1).addmm_(error.T, x, beta=0.9)  # weights of several MB: every pass over them counts
        self.speed_b.mul_(0.9).add_(error.sum(0).view_as(self.bias))
        now = self.lr * decay
        self.weight.addcmul_(self.speed_w, now.view(-1, 1, 1), value=-1)
        self.bias.addcmul_(self.speed_b, now.view(-1, 1), value=-1)
        return loss
