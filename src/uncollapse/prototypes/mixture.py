"""Online EM for a Gaussian mixture on the unit sphere: prototypes that no gradient touches.

Follows Arteaga et al., *Why Prototypes Collapse* (2026): one EM-style update per step from the teacher's
projections, responsibility-based forgetting (after Celaya & Agostini, 2015) and deterministic annealing
(Ueda & Nakano, 1994). What that paper leaves open is an argument here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checks import above_zero, usable_rows
from uncollapse.prototypes.gaussians import (
    Covariance,
    features,
    forget,
    forgetting_factor,
    natural_parameters,
    update_moments,
)
from uncollapse.targets.responsibilities import BUDGET, FLOOR, Components, Posterior, chunks, log_masses, sums
from uncollapse.targets.softmax import SoftmaxTargets

__all__ = ["DISTILLING", "PAPER", "RECOMMENDED", "Balance", "Covariance", "MixtureOptions", "OnlineMixture"]

Balance = Literal["none", "sinkhorn"]


class MixtureOptions(NamedTuple):
    """What a mixture is and how it is fitted; `OnlineMixture` explains each."""

    covariance: Covariance
    memory_steps: float
    balance: Balance
    temperature: float | None
    centred: bool
    renewed: float


RECOMMENDED = MixtureOptions("isotropic", 60.0, "sinkhorn", None, True, 0.0)
"""The clustering that keeps its components alive and apart: `OnlineMixture`'s own defaults."""
DISTILLING = MixtureOptions("shared", 60.0, "sinkhorn", None, True, 1.0)
"""`decoupled` in training: components are the teacher's newest projections, which carry more than clusters of them do
(docs/study.md)."""
PAPER = MixtureOptions("diagonal", 20.0, "none", None, False, 0.0)
"""`decoupled-paper`: Arteaga et al. as literally as what they published allows; unbalanced, so most components die."""


class OnlineMixture(nn.Module):
    """K Gaussian components fitted to a stream of unit vectors, as buffers.

    Args:
        components: K.
        dim: D.
        rows: observations per step over all ranks; sets the forgetting together with ``memory_steps``.
        covariance: one variance for all components (``shared``), one for each (``isotropic``), or one for each
            dimension of each (``diagonal``).
        memory_steps: steps after which half of a component's evidence is new at a fair share of the rows.
        balance: how the E-step shares out the observations. ``none``: Bayes' rule with learned mixture
            weights. ``sinkhorn``: offsets on the log scores give every component equal mass over the rows
            at hand (entropic optimal transport).
        temperature: fixed temperature of the E-step over cosines; ``None``: the Gaussian's own variance.
        centred: directions of the components are taken from the middle of all means instead of the origin.
        renewed: share of an update's rows each of which then takes the place of the oldest component, with the median
            variance. With 1 a component lives ``components / rows`` updates, and the rows at hand are among the
            components that their targets are made of.
        iterations: Sinkhorn iterations per update; offsets start from the last update's.
        variance_floor: smallest variance of one dimension.
        generator: source of the random initial directions.
        budget: bytes of responsibilities held at once. Where those of all rows need more, rows are taken in
            tiles, of 64 at least, and Sinkhorn's iterations form the scores again. On a CPU they stay allocated.

    Raises:
        ValueError: an option out of its range.
    """

    mean: Tensor
    variance: Tensor
    evidence: Tensor
    offset: Tensor
    beta: Tensor
    is_centred: Tensor
    renewals: Tensor

    def __init__(
        self,
        components: int,
        dim: int,
        rows: int,
        covariance: Covariance = RECOMMENDED.covariance,
        memory_steps: float = RECOMMENDED.memory_steps,
        balance: Balance = RECOMMENDED.balance,
        temperature: float | None = RECOMMENDED.temperature,
        centred: bool = RECOMMENDED.centred,
        renewed: float = RECOMMENDED.renewed,
        iterations: int = 3,
        variance_floor: float = 1e-4,
        generator: torch.Generator | None = None,
        budget: int = BUDGET,
    ) -> None:
        super().__init__()
        for name, value, choices in (("covariance", covariance, Covariance), ("balance", balance, Balance)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        if not 0 <= renewed <= 1:
            raise ValueError(f"renewed must be between 0 and 1, got {renewed}")
        positive = {"components": components, "dim": dim, "rows": rows, "memory_steps": memory_steps}
        positive["variance_floor"] = variance_floor
        positive |= {} if temperature is None else {"temperature": temperature}
        if wrong := [f"{name} = {value}" for name, value in positive.items() if not value > 0]:
            raise ValueError(f"must be above 0: {', '.join(wrong)}")
        self.components = components
        self.covariance: Covariance = covariance
        self.balance: Balance = balance
        self.temperature = temperature
        self.iterations = iterations
        self.variance_floor = variance_floor
        self.centred = centred
        self.renewed = renewed
        self.budget = budget
        self._spare: Tensor | None = None
        self.log_lambda = forgetting_factor(memory_steps, components, rows)
        # Random directions, not data: an untrained teacher's projections nearly coincide.
        shape = {"shared": (1, 1), "isotropic": (components, 1), "diagonal": (components, dim)}[covariance]
        self.register_buffer("mean", F.normalize(torch.randn(components, dim, generator=generator), dim=-1))
        self.register_buffer("variance", torch.full(shape, 1.0 / dim))
        # Saturated from the start: with no evidence, the first weak responsibility would move a mean all
        # the way to the data's mean, and all means there together.
        self.register_buffer("evidence", torch.full((components,), 1 / -math.expm1(self.log_lambda)))
        self.register_buffer("offset", torch.zeros(components))
        self.register_buffer("beta", torch.ones(()))  # of the last update: the offsets fit no other
        self.register_buffer("renewals", torch.zeros((), dtype=torch.long))  # how many there have been
        self.register_buffer("is_centred", torch.tensor(float(centred)))  # for who has the state alone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare": None}  # scratch memory is no part of a copy

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("queue", "queued"):  # of versions that balanced over earlier rows as well
            state_dict.pop(prefix + name, None)
        state_dict.setdefault(prefix + "beta", torch.ones(()))
        state_dict.setdefault(prefix + "renewals", torch.zeros((), dtype=torch.long))  # of versions that had none
        state_dict[prefix + "is_centred"] = self.is_centred  # an option, not a state
        super()._load_from_state_dict(state_dict, prefix, *args)

    def directions(self) -> Tensor:
        """The components as prototypes: ``(K, D)`` unit vectors."""
        return F.normalize(self.mean - self._centre() if self.centred else self.mean, dim=-1)

    def log_scores(self, x: Tensor, beta: float | None = None) -> Tensor:
        """Unnormalised log responsibilities ``(n, K)`` of unit vectors ``x (n, D)``, without the offsets.

        At inverse temperature ``beta``, by default the last update's. In the mixture's own float type, whatever
        autocast says.
        """
        with torch.autocast(x.device.type, enabled=False):
            phi, components = self._features(x), self._components(beta)
            parts = chunks(len(self.mean), sum(phi.shape), phi.device)
            if phi.requires_grad:
                return torch.cat([phi @ components.parameters(part).clone().T for part in parts], dim=1)
            out = phi.new_empty(len(phi), len(self.mean))
            for part in parts:
                torch.mm(phi, components.parameters(part).T, out=out[:, part])
            return out

    @torch.no_grad()
    def targets(self, x: Tensor) -> SoftmaxTargets:
        """`responsibilities` of unit vectors ``x (..., D)`` for a loss that makes them where it uses them.

        Later updates do not change them.
        """
        with torch.autocast(x.device.type, enabled=False):
            phi = self._features(x.reshape(-1, x.shape[-1]))
            phi = phi.view(*x.shape[:-1], phi.shape[1])  # of no rows too
            weight = self._components(None).parameters(slice(0, len(self.mean)))
            return SoftmaxTargets(phi, weight, 1.0, self.offset.clone())

    def responsibilities(self, x: Tensor, beta: float | None = None) -> Tensor:
        """The E-step: ``(n, K)``, rows summing to 1, with the offsets of the last update.

        Offsets balance the components at the inverse temperature they were found at, which is the default of
        ``beta``.
        """
        scores = self.log_scores(x, beta).add_(self.offset)
        scores = scores.sub_(scores.detach().amax(-1, keepdim=True)).clamp_min(FLOOR)
        return torch.softmax(scores, dim=-1)

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor | None = None, beta: float = 1.0) -> None:
        """One online EM update from unit vectors ``x (n, D)``, each counting ``weight (n,)`` times (default 1).

        A row of weight w counts as w rows, in the balancing as in the moments, and one of weight 0 as none, whatever
        it holds; no rows change nothing. But for rounding, the result does not depend on the order of the rows and the
        budget. Under data parallelism, pass the rows of all ranks, in the same order on each.

        Args:
            x: float of any type, computed in the mixture's own.
            weight: finite, 0 or above, of any type.
            beta: inverse temperature of the E-step, above 0; 1 unless it is annealed.

        Raises:
            ValueError: shapes that do not fit, a negative weight, a row that is not finite. Nothing has changed
                then. To know, a GPU is waited for once; to choose the rows that renew components, again.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.mean.dtype)
            weight = None if weight is None else weight.to(x)
            count = usable_rows(x, weight, self.mean.shape[1])
            if not count:
                return
            if weight is not None:
                x = x.masked_fill((weight == 0).unsqueeze(-1), 0)
            # What was allocated under inference_mode cannot be written to outside of it.
            usable = self._spare is not None and self._spare.is_inference() == torch.is_inference_mode_enabled()
            spare = self._spare if usable else None
            posterior = Posterior(self._features(x), self._components(beta), self.offset, self.budget, spare)
            self.beta.fill_(beta)
            if self.balance == "sinkhorn":
                self._rebalance(posterior, count, weight)
            self._update(sums(posterior, weight))
            self._spare = posterior.spare if x.device.type == "cpu" else None
            if self.renewed:
                self._renew(x, weight)

    def _rebalance(self, posterior: Posterior, count: float, weight: Tensor | None) -> None:
        """Sinkhorn's scaling of the components over the rows at hand; a starved one gains about e⁶⁴ an iteration."""
        fair = math.log(count / self.components)
        for _ in range(self.iterations):
            posterior.add(fair - log_masses(posterior, row_weight=weight))
        # The softmax ignores a common constant, float32 does not.
        self.offset.copy_(posterior.offset - posterior.offset.sum() / self.components)

    def _update(self, parts: Iterable[tuple[slice, Tensor]]) -> None:
        """The M-step from the sums of some components at a time, in place."""
        shared = self.mean.new_zeros(2)
        for part, summed in parts:
            mass = summed[:, -1]
            self.evidence[part], rho = forget(self.log_lambda, mass, self.evidence[part])
            old = None if self.temperature is not None else self.variance
            if old is not None and self.covariance != "shared":
                old = old[part]
            variance = update_moments(self.mean[part], old, rho, summed, self.covariance)
            if variance is None:
                continue
            if self.covariance == "shared":
                shared += torch.stack([variance[:, 0] @ mass, mass.sum()])
                continue
            variance.clamp_min_(self.variance_floor)
            if self.covariance == "isotropic":
                self.variance[part] = variance
        if self.covariance == "shared" and self.temperature is None:
            total, mass = shared
            self.variance.copy_(torch.where(mass > 0, total / mass, self.variance)).clamp_min_(self.variance_floor)

    def _renew(self, x: Tensor, weight: Tensor | None) -> None:
        """Puts the oldest components where rows are: evenly chosen ones, of several weights the heavier the likelier.

        Rows that count once or more are all chosen where every row is to be, so that those of a level with few rows are
        not crowded out by one with many.
        """
        each = x.new_ones(len(x), dtype=torch.float64) if weight is None else weight.double()
        share = torch.clamp(self.components / each.sum(), max=self.renewed)
        golden = 0.5 * (math.sqrt(5) - 1)  # where the count starts, so that it is not at the same rows every time
        counted = (each.cumsum(0) * share + (int(self.renewals) * golden) % 1).floor()
        rows = torch.diff(counted, prepend=counted.new_zeros(1)).nonzero().squeeze(-1)
        at = (self.renewals + torch.arange(len(rows), device=x.device)) % self.components
        self.renewals += len(rows)
        self.mean[at], self.offset[at] = x[rows], 0
        if self.covariance != "shared":
            self.variance[at] = self.variance.median(0).values

    # --- what the posterior asks for --------------------------------------------------------------------

    def _centre(self) -> Tensor:
        return self.mean.sum(0) / self.components

    def _features(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.mean.shape[1]:
            raise ValueError(f"rows of a mixture must be (rows, {self.mean.shape[1]}), got {tuple(x.shape)}")
        return features(x.to(self.mean.dtype), None if self.temperature is not None else self.covariance)

    def _components(self, beta: float | None) -> Components:
        """Parameters of the log scores, as they are now, at inverse temperature ``beta`` (None: the last update's)."""
        temperature, covariance = self.temperature, self.covariance
        power: float | Tensor = self.beta if beta is None else beta
        if beta is not None:
            above_zero(beta, "beta")
        if isinstance(power, Tensor) and power.device.type == "cpu":
            power = float(power)  # where it can be read without waiting, 1 costs nothing
        centre = self._centre() if self.centred and temperature is not None else None
        log_total = None
        if self.balance == "none":
            log_total = self.evidence.sum().log()

        buffer = self.mean.new_empty(0, 0)

        def parameters(part: slice | Tensor) -> Tensor:
            nonlocal buffer
            mean = self.mean[part]
            log_weight: Tensor | float = 0.0 if log_total is None else self.evidence[part].log() - log_total
            if temperature is not None:
                directions = F.normalize(mean if centre is None else mean - centre, dim=-1)
                eta = F.pad(directions.mul_(1 / temperature), (0, 1))
                eta[:, -1] = log_weight
                return _scaled(eta, power)
            variance = self.variance if covariance == "shared" else self.variance[part]
            reuse = buffer[: len(mean)] if len(mean) <= len(buffer) else None
            eta = natural_parameters(mean, variance, covariance, log_weight, reuse)
            buffer = eta if reuse is None else buffer  # fresh pages for every chunk would cost as much as filling them
            return _scaled(eta, power)

        return Components(self.components, parameters)


def _scaled(eta: Tensor, power: float | Tensor) -> Tensor:
    return eta if isinstance(power, float) and power == 1 else eta.mul_(power)
