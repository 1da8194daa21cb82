"""Online EM for a Gaussian mixture on the unit sphere: prototypes that no gradient touches.

Follows Arteaga et al., *Why Prototypes Collapse* (2026): one EM-style update per step from the teacher's
projections, responsibility-based forgetting (after Celaya & Agostini, 2015) and deterministic annealing
(Ueda & Nakano, 1994). What that paper leaves open is an argument here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uncollapse.checks import above_zero, usable_rows
from uncollapse.distributed import Group, max_over_ranks, rank_and_size, shard, sum_over_ranks
from uncollapse.prototypes.gaussians import (
    Covariance,
    features,
    forget,
    forgetting_factor,
    natural_parameters,
    update_moments,
)
from uncollapse.targets.responsibilities import BUDGET, FLOOR, Components, Posterior, chunks, log_masses, sums, top_sums
from uncollapse.targets.softmax import SoftmaxTargets

__all__ = ["PAPER", "RECOMMENDED", "Balance", "Covariance", "MixtureOptions", "OnlineMixture"]

Balance = Literal["none", "sinkhorn"]


class MixtureOptions(NamedTuple):
    """What a mixture is and how it is fitted; `OnlineMixture` explains each."""

    covariance: Covariance
    memory_steps: float
    balance: Balance
    temperature: float | None
    centred: bool


RECOMMENDED = MixtureOptions("isotropic", 60.0, "sinkhorn", None, True)
"""The form that keeps its prototypes alive and apart, `decoupled` in training; `OnlineMixture`'s own defaults."""
PAPER = MixtureOptions("diagonal", 20.0, "none", None, False)
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
        iterations: Sinkhorn iterations per update; offsets start from the last update's.
        variance_floor: smallest variance of one dimension.
        generator: source of the random initial directions.
        top: only so many of the largest responsibilities of each row, scaled to sum to 1, enter the M-step;
            ``None``: all of them. The E-step and its balancing look at all components either way.
        group: ranks that share the components out: each holds the rows `distributed.shard` gives it of what one
            process would hold. All of them observe the same rows.
        budget: bytes of responsibilities held at once. Where those of all rows need more, rows are taken in
            tiles, of 64 at least, and Sinkhorn's iterations form the scores again. On a CPU they stay allocated.

    Raises:
        ValueError: an option out of its range, or fewer components than ranks.
    """

    mean: Tensor
    variance: Tensor
    evidence: Tensor
    offset: Tensor
    beta: Tensor
    is_centred: Tensor

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
        iterations: int = 3,
        variance_floor: float = 1e-4,
        generator: torch.Generator | None = None,
        top: int | None = None,
        group: Group = None,
        budget: int = BUDGET,
    ) -> None:
        super().__init__()
        if components < rank_and_size(group)[1]:
            raise ValueError(f"{components} components cannot be shared out over {rank_and_size(group)[1]} ranks")
        if top is not None and top < 1:
            raise ValueError(f"top must be at least 1, or None for all components: {top}")
        for name, value, choices in (("covariance", covariance, Covariance), ("balance", balance, Balance)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
        positive = {"rows": rows, "memory_steps": memory_steps, "variance_floor": variance_floor}
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
        self.top = top
        self.group = group
        self.budget = budget
        self._spare: Tensor | None = None
        self.log_lambda = forgetting_factor(memory_steps, components, rows)
        # Random directions, not data: an untrained teacher's projections nearly coincide.
        mean = random_directions(components, dim, shard(components, group), generator)
        count = len(mean)
        shape = {"shared": (1, 1), "isotropic": (count, 1), "diagonal": (count, dim)}[covariance]
        self.register_buffer("mean", mean)
        self.register_buffer("variance", torch.full(shape, 1.0 / dim))
        # Saturated from the start: with no evidence, the first weak responsibility would move a mean all
        # the way to the data's mean, and all means there together.
        self.register_buffer("evidence", torch.full((count,), 1 / -math.expm1(self.log_lambda)))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("beta", torch.ones(()))  # of the last update: the offsets fit no other
        self.register_buffer("is_centred", torch.tensor(float(centred)))  # for who has the state alone

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlineMixture:
        memo[id(self.group)] = self.group  # a copy belongs to the same ranks
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare": None}  # scratch memory is no part of a copy

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("queue", "queued"):  # of versions that balanced over earlier rows as well
            state_dict.pop(prefix + name, None)
        state_dict.setdefault(prefix + "beta", torch.ones(()))
        state_dict[prefix + "is_centred"] = self.is_centred  # an option, not a state
        super()._load_from_state_dict(state_dict, prefix, *args)

    def directions(self) -> Tensor:
        """The components as prototypes: ``(K, D)`` unit vectors; this rank's, if sharded."""
        return F.normalize(self.mean - self._centre() if self.centred else self.mean, dim=-1)

    def log_scores(self, x: Tensor, beta: float | None = None) -> Tensor:
        """Unnormalised log responsibilities ``(n, K)`` of unit vectors ``x (n, D)``, without the offsets.

        At inverse temperature ``beta``, by default the last update's. In the mixture's own float type, whatever
        autocast says. Of this rank's components, if sharded.
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

        Later updates do not change them. Of this rank's components, if sharded.
        """
        with torch.autocast(x.device.type, enabled=False):
            phi = self._features(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            weight = self._components(None).parameters(slice(0, len(self.mean)))
            return SoftmaxTargets(phi, weight, 1.0, self.offset.clone())

    def responsibilities(self, x: Tensor, beta: float | None = None) -> Tensor:
        """The E-step: ``(n, K)``, rows summing to 1, with the offsets of the last update.

        Offsets balance the components at the inverse temperature they were found at, which is the default of
        ``beta``. If sharded, this rank's columns; the rows sum to 1 over all ranks, and no gradient passes.
        """
        scores = self.log_scores(x, beta).add_(self.offset)
        top = max_over_ranks(scores.detach().amax(-1, keepdim=True), self.group)
        scores = scores.sub_(top).clamp_min(FLOOR)
        if self.group is None:
            return torch.softmax(scores, dim=-1)
        weight = scores.detach().exp_()
        return weight.div_(self._sum(weight.sum(-1, keepdim=True)))

    @torch.no_grad()
    def observe(self, x: Tensor, weight: Tensor | None = None, beta: float = 1.0) -> None:
        """One online EM update from unit vectors ``x (n, D)``, each counting ``weight (n,)`` times (default 1).

        A row of weight w counts as w rows, in the balancing as in the moments, and one of weight 0 as none, whatever
        it holds; no rows change nothing. But for rounding, the result does not depend on the order of the rows, the
        budget and the number of ranks. Under data parallelism, pass the rows of all ranks, in the same order on each.

        Args:
            x: float of any type, computed in the mixture's own.
            weight: finite, 0 or above, of any type.
            beta: inverse temperature of the E-step, above 0; 1 unless it is annealed.

        Raises:
            ValueError: shapes that do not fit, a negative weight, a row that is not finite. Nothing has changed
                then. To know, a GPU is waited for once.
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
            if self.top is None:
                self._update(sums(posterior, weight))
            else:
                index, summed, _ = top_sums(posterior, self.top, weight)
                self._update([(index, summed)])
            self._spare = posterior.spare if x.device.type == "cpu" else None

    def _rebalance(self, posterior: Posterior, count: float, weight: Tensor | None) -> None:
        """Sinkhorn's scaling of the components over the rows at hand; a starved one gains about e⁶⁴ an iteration."""
        fair = math.log(count / self.components)
        for _ in range(self.iterations):
            posterior.add(fair - log_masses(posterior, row_weight=weight))
        # The softmax ignores a common constant, float32 does not.
        self.offset.copy_(posterior.offset - self._sum(posterior.offset.sum()) / self.components)

    def _update(self, found: Iterable[tuple[slice | Tensor, Tensor]]) -> None:
        """The M-step from the sums of some components at a time, in place."""
        shared = self.mean.new_zeros(2)
        for part, summed in found:
            mass = summed[:, -1]
            self.evidence[part], rho = forget(self.log_lambda, mass, self.evidence[part])
            old = None if self.temperature is not None else self.variance
            if old is not None and self.covariance != "shared":
                old = old[part]
            mean = self.mean[part]
            variance = update_moments(mean, old, rho, summed, self.covariance)
            copied = not isinstance(part, slice)  # an index copies, a slice does not
            if copied:
                self.mean[part] = mean
            if variance is None:
                continue
            if self.covariance == "shared":
                shared += torch.stack([variance[:, 0] @ mass, mass.sum()])
                continue
            variance.clamp_min_(self.variance_floor)
            if copied or self.covariance == "isotropic":
                self.variance[part] = variance
        if self.covariance == "shared" and self.temperature is None:
            total, mass = self._sum(shared)
            self.variance.copy_(torch.where(mass > 0, total / mass, self.variance)).clamp_min_(self.variance_floor)

    # --- what the posterior asks for --------------------------------------------------------------------

    def _sum(self, x: Tensor) -> Tensor:
        return sum_over_ranks(x, self.group)

    def _centre(self) -> Tensor:
        return self._sum(self.mean.sum(0)) / self.components

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
            log_total = self._sum(self.evidence.sum()).log()

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

        return Components(len(self.mean), parameters, -(-self.components // rank_and_size(self.group)[1]), self.group)


def _scaled(eta: Tensor, power: float | Tensor) -> Tensor:
    return eta if isinstance(power, float) and power == 1 else eta.mul_(power)


def random_directions(
    components: int, dim: int, part: slice, generator: torch.Generator | None, block: int = 1 << 16
) -> Tensor:
    """Rows ``part`` of ``(K, D)`` unit vectors, without ever holding more than those and a block of the others."""
    out = torch.empty(part.stop - part.start, dim)
    for start in range(0, components, block):
        drawn = torch.randn(min(block, components - start), dim, generator=generator)
        first, last = max(start, part.start), min(start + len(drawn), part.stop)
        if first < last:
            out[first - part.start : last - part.start] = F.normalize(drawn[first - start : last - start], dim=-1)
    return out
