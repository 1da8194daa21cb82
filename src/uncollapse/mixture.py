"""Online EM for a Gaussian mixture on the unit sphere: prototypes that no gradient touches.

Follows Arteaga et al., *Why Prototypes Collapse* (2026): one EM-style update per step from the teacher's
projections, responsibility-based forgetting (after Celaya & Agostini, 2015) and deterministic annealing
(Ueda & Nakano, 1994). What that paper leaves open is an argument here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Covariance = Literal["shared", "isotropic", "diagonal"]
Balance = Literal["none", "sinkhorn"]


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


class OnlineMixture(nn.Module):
    """K Gaussian components fitted to a stream of unit vectors, as buffers.

    Args:
        components: K.
        dim: D.
        rows: observations per step over all ranks; sets the forgetting together with ``memory_steps``.
        covariance: one variance for all components, one for each, or one for each dimension of each.
        memory_steps: steps after which half of a component's evidence is new at a fair share of the rows.
        balance: how the E-step shares out the observations. ``none``: Bayes' rule with learned mixture
            weights. ``sinkhorn``: offsets on the log scores give every component equal mass over the rows
            at hand and a queue of earlier ones (entropic optimal transport).
        temperature: fixed temperature of the E-step over cosines; ``None``: the Gaussian's own variance.
        queue: earlier observations that balancing looks at besides the new ones. A batch far smaller than
            K cannot tell which components are needed: each would be given rows that belong to others.
        iterations: Sinkhorn iterations per update; offsets start from the last update's.
        variance_floor: smallest variance of one dimension.
        centred: directions of the components are taken from the middle of all means instead of the origin.
        generator: source of the random initial directions.
    """

    mean: Tensor
    variance: Tensor
    evidence: Tensor
    offset: Tensor
    queue: Tensor
    queued: Tensor

    def __init__(
        self,
        components: int,
        dim: int,
        rows: int,
        covariance: Covariance = "diagonal",
        memory_steps: float = 20.0,
        balance: Balance = "none",
        temperature: float | None = None,
        queue: int = 0,
        iterations: int = 3,
        variance_floor: float = 1e-4,
        centred: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.covariance: Covariance = covariance
        self.balance: Balance = balance
        self.temperature = temperature
        self.iterations = iterations
        self.variance_floor = variance_floor
        self.centred = centred
        self.log_lambda = forgetting_factor(memory_steps, components, rows)
        shape = {"shared": (1, 1), "isotropic": (components, 1), "diagonal": (components, dim)}[covariance]
        # Random directions, not data: an untrained teacher's projections nearly coincide.
        self.register_buffer("mean", F.normalize(torch.randn(components, dim, generator=generator), dim=-1))
        self.register_buffer("variance", torch.full(shape, 1.0 / dim))
        # Saturated from the start: with no evidence, the first weak responsibility would move a mean all
        # the way to the data's mean, and all means there together.
        self.register_buffer("evidence", torch.full((components,), 1 / -math.expm1(self.log_lambda)))
        self.register_buffer("offset", torch.zeros(components))
        self.register_buffer("queue", torch.zeros(queue, dim))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))

    def directions(self) -> Tensor:
        """The components as prototypes: ``(K, D)`` unit vectors."""
        return F.normalize(self.mean - self.mean.mean(0) if self.centred else self.mean, dim=-1)

    def log_scores(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Unnormalised log responsibilities ``(n, K)`` of unit vectors ``x (n, D)``, without the offsets."""
        if self.temperature is not None:
            return (x @ self.directions().T).mul_(beta / self.temperature)
        precision = 1 / self.variance
        if self.covariance == "diagonal":
            scores = x @ (self.mean * precision).T
            scores -= 0.5 * (x.square() @ precision.T)
            constant = (self.mean.square() * precision + self.variance.log()).sum(-1)
        else:
            scores = (x @ self.mean.T) * precision.T
            scores -= 0.5 * x.square().sum(-1, keepdim=True) * precision.T
            constant = self.mean.square().sum(-1) * precision[:, 0] + x.shape[1] * self.variance[:, 0].log()
        scores -= 0.5 * constant
        if self.balance == "none":
            scores += (self.evidence / self.evidence.sum()).log()
        return scores.mul_(beta)

    def responsibilities(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """The E-step: ``(n, K)``, rows summing to 1, with the offsets of the last update."""
        return torch.softmax(self.log_scores(x, beta) + self.offset, dim=-1)

    def _rebalance(self, x: Tensor, beta: float) -> None:
        """Sinkhorn's scaling of the components, over ``x`` and the queue; then ``x`` joins the queue."""
        known = self.queue[: int(self.queued.clamp(max=len(self.queue)))]
        scores = self.log_scores(torch.cat([x, known]), beta)
        fair = math.log(len(scores) / len(self.offset))
        for _ in range(self.iterations):
            mass = torch.softmax(scores + self.offset, dim=-1).sum(0)
            self.offset -= mass.clamp_min(1e-30).log() - fair
        self.offset -= self.offset.mean()  # the softmax ignores a common constant, float32 does not
        if len(self.queue):
            x = x[-len(self.queue) :]
            at = (int(self.queued) + torch.arange(len(x), device=x.device)) % len(self.queue)
            self.queue[at] = x
            self.queued += len(x)

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor | None = None, beta: float = 1.0) -> None:
        """One online EM update from unit vectors ``x (n, D)``, each counting ``weight (n,)`` times (default 1).

        The result does not depend on the order of the rows. Under data parallelism, pass the rows of all
        ranks, in the same order on each.
        """
        x = x.to(self.mean.dtype)
        if self.balance == "sinkhorn":
            self._rebalance(x, beta)
        posterior = self.responsibilities(x, beta)
        if weight is not None:
            posterior = posterior * weight.unsqueeze(-1)
        mass = posterior.sum(0)
        self.evidence, rho = forget(self.log_lambda, mass, self.evidence)
        rho = rho.unsqueeze(-1)
        batch_mean = (posterior.T @ x) / mass.clamp_min(1e-30).unsqueeze(-1)
        if self.temperature is None:
            self._update_variance(x, posterior, mass, batch_mean, rho)
        self.mean.lerp_(batch_mean, rho)

    def _update_variance(self, x: Tensor, posterior: Tensor, mass: Tensor, batch_mean: Tensor, rho: Tensor) -> None:
        """Centred form (Welford): the batch's own spread plus the move of the mean, without cancellation."""
        safe = mass.clamp_min(1e-30).unsqueeze(-1)
        spread = ((posterior.T @ x.square()) / safe - batch_mean.square()).clamp_min_(0)
        spread = torch.where(mass.unsqueeze(-1) > 0, spread, torch.zeros(()).to(spread))
        moved = rho * (batch_mean - self.mean).square()
        if self.covariance == "diagonal":
            updated = (1 - rho) * (self.variance + moved) + rho * spread
        else:
            moved, spread = moved.mean(-1, keepdim=True), spread.mean(-1, keepdim=True)
            updated = (1 - rho) * (self.variance + moved) + rho * spread
            if self.covariance == "shared":
                updated = (updated * mass.unsqueeze(-1)).sum(0, keepdim=True) / mass.sum()
        self.variance.copy_(updated.clamp_min(self.variance_floor))
