"""Linear probe: a grid of classifiers on frozen features, trained at once, chosen on training rows that were held out.

The one linear probe: at the end of a run it sees the features of the last block, and `evaluate.tasks.linear` gives it
several blocks and pooled patches to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from uncollapse.measure.probes import check_features, held_out

RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
"""13 learning rates at batch 256, in steps of 1-2-5. DINOv2's grid, one decade up: features are standardised and
small sets get fewer steps than its 12,500."""
HELD_OUT = 0.1
_NOTHING = 1e-20
EPOCHS, LEAST_STEPS, MOST_SMALL_EPOCHS = 10, 1000, 100


@dataclass(frozen=True)
class Probe:
    """The classifier that the grid's scores chose, fitted again on all of train."""

    input: int
    """Which of the inputs it sees."""
    rate: float
    table: list[tuple[int, float, float, float]]
    """Input, learning rate, accuracy and cross-entropy on held-out training rows of every classifier of the grid."""
    scores: Tensor
    """(m, classes), of the test rows."""


def linear_probe(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int | None = None,
    inputs: Sequence[slice] = (slice(None),),
    seed: int = 0,
    rates: Sequence[float] = RATES,
    device: torch.device | str = "cpu",
    report: Callable[[int, int, float], None] | None = None,
) -> Probe:
    """The best of a grid of linear classifiers on frozen features, by training rows that were held out.

    Every learning rate and input is trained at once, on the same batches: SGD with momentum 0.9, no weight decay,
    batches of 256 (1,024 above 50,000 rows), cosine decay, `steps_for` so many steps. Features are standardised by the
    mean and deviation of the rows that a classifier is fitted on. The grid is fitted on 90 % of train and scored on the
    other 10 %, stratified by class; the most accurate (ties: the lowest cross-entropy there) is fitted again on all of
    train, and only that one sees ``test``. As DINOv2's linear evaluation (Oquab et al. 2024), chosen on held-out
    training data as CAPI's (Darcet et al. 2025).

    Args:
        train: ``(N, F)`` floating. labels: ``(N,)`` integers from 0.
        test: ``(m, F)``. Its labels are not asked for.
        classes: how many there may be; None: the largest label and one.
        inputs: columns that the classifiers of one group see.
        seed: of the split, the start and the order of batches.
        rates: learning rates for a batch of 256; scaled by batch / 256.
        report: called with (steps done, steps to do, loss).

    Raises:
        ValueError: one class, one row in all or one of each class, or features that are not finite.
    """
    check_features(train, labels, test)
    y = labels.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise ValueError("the training images are all of one class; a classifier needs at least two")
    train, labels, test = train.float().cpu(), labels.cpu(), test.float().cpu()
    classes = int(y.max()) + 1 if classes is None else classes
    fit, check = split(y, HELD_OUT, seed)
    first, second = steps_for(len(fit))[1], steps_for(len(y))[1]

    def told(steps: int, loss: float) -> None:
        if report is not None:
            report(steps, first + second, loss)

    groups = [(columns, rates) for columns in inputs]
    grids = _train(train[fit], labels[fit], train[check], classes, groups, seed, device, told)
    table: list[tuple[int, float, float, float]] = []
    for number, grid in enumerate(grids):
        accuracy = (grid.argmax(2) == labels[check]).double().mean(1)
        # A rate at which training ran away scores nothing.
        ran_away = ~torch.isfinite(grid).all(2).all(1)
        accuracy[ran_away] = 0
        surprise = torch.stack([cross_entropy(scores, labels[check]) for scores in grid])
        surprise[ran_away] = torch.inf
        table += [(number, *row) for row in zip(rates, accuracy.tolist(), surprise.tolist(), strict=True)]
    best, rate, *_ = max(table, key=lambda row: (row[2], -row[3]))
    train, test, again = train[:, inputs[best]], test[:, inputs[best]], [(slice(None), [rate])]
    (scores,) = _train(train, labels, test, classes, again, seed, device, lambda n, loss: told(first + n, loss))
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
    """Batch size and number of steps for n images: 10 epochs but at least 1,000 steps, unless those are 100 epochs."""
    batch = min(n, 256 if n <= 50_000 else 1024)
    epoch = n / batch
    return batch, max(math.ceil(EPOCHS * epoch), min(LEAST_STEPS, math.ceil(MOST_SMALL_EPOCHS * epoch)))


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
