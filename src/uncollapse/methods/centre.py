"""The teacher's targets as every method makes them, and DINO's centre, as every method that centres keeps it."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.config.facts import centres_probabilities, queue_of, targets_of
from uncollapse.config.schema import Config
from uncollapse.distributed import Group
from uncollapse.methods.contract import At
from uncollapse.prototypes.sets import Prototypes
from uncollapse.schedules import linear_epochs
from uncollapse.targets.prior import power_law
from uncollapse.targets.sinkhorn import sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets, log_marginal

CENTER = "center"


def temperature_at(c: Config, at: At, start: float | None = None) -> float:
    """The teacher's: a linear warm-up from ``start``, constant within an epoch or not, then ``teacher.temperature``."""
    t = c.teacher
    first = t.temperature_start if start is None else start
    if t.temperature_by == "step":
        share = min(1.0, at.epoch / t.temperature_warmup_epochs) if t.temperature_warmup_epochs else 1.0
        return first + (t.temperature - first) * share
    return linear_epochs(int(at.epoch), first, t.temperature, t.temperature_warmup_epochs)


def assigned(
    c: Config,
    z: Tensor,
    prototypes: Prototypes,
    temperature: float,
    group: Group,
    center: Tensor | None = None,
    iterations: int = 3,
    marginal: Tensor | None = None,
    of_probabilities: bool = False,
) -> SoftmaxTargets:
    """The target that ``c`` asks for, of projections ``z (..., D)``.

    ``centred``: ``softmax((logits - center) / τ)`` (Caron et al. 2021, Algorithm 1), or with a centre of probabilities
    ``softmax(logits / τ - center)``. ``sinkhorn``: balanced over all rows and ranks together, as DINOv2 does it;
    ``power-law`` is that with shares that fall as PMSN's prior does. ``posterior``: the set's own. Otherwise plain
    softmax, which `balance` adds to.

    Args:
        center: ``(K,)``; a method without one is never asked for ``centred``.
        iterations: of Sinkhorn.
        marginal: ``(K,)``, and ``of_probabilities``: as `sinkhorn_offsets` takes them.
    """
    kind = targets_of(c)
    if kind == "posterior":
        return prototypes.posterior(z, temperature)
    if kind == "power-law":
        marginal = power_law(c.prototypes.count, c.prototypes.power, z)
    if kind in ("sinkhorn", "power-law") and not queue_of(c)[0]:
        weight, bias = prototypes.affine("teacher", temperature)
        offsets = sinkhorn_offsets(
            z.flatten(0, -2),
            weight,
            temperature,
            iterations,
            bias,
            group,
            marginal=marginal,
            of_probabilities=of_probabilities,
        )
        return prototypes.targets(z, temperature, offsets)
    if kind == "centred":
        assert center is not None
        return prototypes.targets(z, temperature, -center if centres_probabilities(c) else -center / temperature)
    return prototypes.targets(z, temperature)


@torch.no_grad()
def recentre(
    c: Config, center: Tensor, z: Tensor, prototypes: Prototypes, temperature: float, mean: Tensor | None = None
) -> None:
    """After the loss: ``center ← m center + (1 - m) · new``, in place.

    ``new`` is the mean of the raw teacher logits of ``z (..., D)`` (Caron et al. 2021, eq. 4), or the log of its mean
    probabilities (Govindarajan et al. 2023). Logits are linear in z, so their mean is the logit of the mean projection
    (``mean``, where that is known): no ``(n, K)`` array is read, and ranks exchange D numbers.
    """
    if targets_of(c) != "centred":
        return
    if centres_probabilities(c):
        new = log_marginal(prototypes.targets(z.flatten(0, -2), temperature))
    else:
        average = z.flatten(0, -2).mean(0) if mean is None else mean
        weight, bias = prototypes.affine("teacher", temperature)
        new = (average.unsqueeze(0) @ weight.T).squeeze(0)
        if bias is not None and c.prototypes.kind == "capi":  # a layer's own; a normaliser is not averaged
            new = new + temperature * bias
    center.lerp_(new, 1 - c.teacher.center_momentum)
