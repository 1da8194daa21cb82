"""The two steps of online EM for Gaussians, component by component: natural parameters and the update of moments.

Plain functions on the components at hand (all K, or a chunk); `posterior` has what concerns all of them
at once.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Covariance = Literal["shared", "isotropic", "diagonal"]


def forgetting_factor(memory_steps: float, components: int, rows: int) -> float:
    """ln λ, the log discount of old evidence per unit of responsibility.

    With ``rows`` observations a step, a component's fair share is ``rows / components`` units, so λ is set
    such that λ^(memory_steps · share) = 1/2: half of its evidence is new after ``memory_steps`` steps,
    whatever K and the batch.
    """
    return -math.log(2) * components / (memory_steps * rows)


def forget(log_lambda: float, weight: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibility-based forgetting: new evidence, and the share ρ of it that is new.

    With λ < 1 and weights w ≥ 0: ``g = (1 - λ^w) / (1 - λ)``, ``N ← λ^w N + g``, ``ρ = g / N``. A component
    that got nothing (w = 0) forgets nothing; evidence never exceeds ``max(N₀, 1 / (1 - λ))``.
    """
    lost = -torch.expm1(weight * log_lambda)  # 1 - λ^w without cancellation
    gained = lost / -math.expm1(log_lambda)
    evidence = (1 - lost) * evidence + gained
    return evidence, gained / evidence.clamp_min(torch.finfo(evidence.dtype).tiny)


def features(x: Tensor, covariance: Covariance | None) -> Tensor:
    """What a Gaussian's log density is linear in: ``[x, -x²/2, 1]`` diagonal, ``[x, -|x|²/2, 1]`` isotropic or shared.

    Args:
        x: ``(n, D)``.
        covariance: None where scores are cosines: ``[x, 1]``.
    """
    squares = [] if covariance is None else [-0.5 * x.square()]
    if covariance in ("isotropic", "shared"):
        squares = [squares[0].sum(-1, keepdim=True)]
    return torch.cat([x, *squares, torch.ones_like(x[:, :1])], dim=1)


def natural_parameters(
    mean: Tensor, variance: Tensor, covariance: Covariance, log_weight: Tensor | float, out: Tensor | None = None
) -> Tensor:
    """η ``(k, F)`` with ``features(x) @ η.T = log(weight · N(x; mean, variance))`` up to ``D/2 · log 2π``.

    Args:
        mean: ``(k, D)``.
        variance: ``(k, D)`` diagonal, ``(k, 1)`` isotropic or ``(1, 1)`` shared; above 0.
        log_weight: ``(k,)`` or one number.
        out: ``(k, F)`` to write to.
    """
    k, dim = mean.shape
    out = mean.new_empty(k, dim + (dim if covariance == "diagonal" else 1) + 1) if out is None else out
    scaled, precision = out[:, :dim], out[:, dim:-1]
    if covariance == "diagonal":
        torch.reciprocal(variance, out=precision)
        torch.mul(mean, precision, out=scaled)
        both = variance.log().addcmul_(mean, scaled).sum(-1)
    else:
        precision[:] = variance.reciprocal()
        torch.mul(mean, precision, out=scaled)
        both = _square(mean)[:, 0] * precision[:, 0] + dim * variance[:, 0].log()
    out[:, -1] = log_weight - 0.5 * both
    return out


def _square(x: Tensor) -> Tensor:
    """``|x|²`` of every row ``(k, 1)`` in one pass; a square and a sum are two, and an array between them."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()


def update_moments(
    mean: Tensor, variance: Tensor | None, rho: Tensor, sums: Tensor, covariance: Covariance
) -> Tensor | None:
    """Moves means, in place, to those of old and new data together, and returns the new variances.

    Centred form (Welford): the batch's own spread plus the move of the mean, without cancellation.

    Args:
        mean: ``(k, D)``, overwritten.
        variance: ``(k, D)`` diagonal, overwritten; ``(k, 1)`` isotropic or ``(1, 1)`` shared; None leaves it out.
        rho: ``(k,)`` in [0, 1], the share of a component's evidence that is new.
        sums: ``(k, F)``, responsibility-weighted sums of `features`; overwritten, so that nothing of that size is
            taken anew.
        covariance: of ``variance``; a shared one comes back once per component ``(k, 1)``, to be averaged.
    """
    dim, rho = mean.shape[1], rho.unsqueeze(-1)
    per_mass = sums[:, -1:].clamp_min(1e-30).reciprocal_()
    batch = sums[:, :dim].mul_(per_mass)
    if variance is None:
        mean.addcmul_(batch.sub_(mean), rho)
        return None
    second = sums[:, dim:-1].mul_(-2 * per_mass)
    if covariance == "diagonal":
        spread = second.addcmul_(batch, batch, value=-1).clamp_min_(0)
        mean.addcmul_(batch.sub_(mean), rho)
        return variance.addcmul_(batch.square_(), rho).lerp_(spread, rho)
    spread = second.sub_(_square(batch)).div_(dim).clamp_min_(0)
    mean.addcmul_(batch.sub_(mean), rho)
    return torch.addcmul(variance, _square(batch), rho / dim).lerp_(spread, rho)
