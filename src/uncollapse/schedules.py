"""Values that change during training, each as a function of the step alone, so that a resumed run agrees."""

from __future__ import annotations

import math


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0, first: float = 0.0) -> float:
    """Linear warm-up from ``first`` to ``start`` over ``warmup`` steps, then half a cosine down (or up) to ``end``.

    The last warm-up step already has the full value and ``end`` would be reached at step ``total``, one
    past the last, as in DINO's released schedules.
    """
    if step < warmup:
        return first + (start - first) * step / max(1, warmup - 1)
    share = (min(step, total) - warmup) / max(1, total - warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def linear(step: int, total: int, start: float, end: float) -> float:
    """A straight line from ``start`` at step 0 to ``end`` at step ``total``."""
    return start + (end - start) * min(step, total) / total


def linear_epochs(epoch: int, start: float, end: float, warmup_epochs: float) -> float:
    """DINO's teacher temperature: constant within an epoch, ``end`` from the last warm-up epoch on."""
    if epoch >= warmup_epochs - 1:
        return start if warmup_epochs == 1 and epoch == 0 else end
    return start + (end - start) * epoch / (warmup_epochs - 1)
