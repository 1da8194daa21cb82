"""How the teacher's target is made from its logits: centering, Sinkhorn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.checks import above_zero, fits, has_shape, not_empty, one_shape
from uncollapse.distributed import Group
from uncollapse.targets.prior import log_shares
from uncollapse.targets.responsibilities import BUDGET, Components, Posterior, log_masses


def centred_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """DINO's target: ``softmax((logits - center) / temperature)``, rows summing to 1.

    Args:
        logits: ``(..., K)`` float32, teacher's, not divided by a temperature.
        center: ``(K,)``, running mean of such logits; subtracted before the division, as DINO does.
        temperature: above 0.

    Raises:
        ValueError: an empty batch, shapes that do not fit, or a temperature that is not above 0.
    """
    above_zero(temperature)
    not_empty(logits.shape[:-1].numel())
    has_shape(center, (logits.shape[-1],), "center")
    return torch.softmax((logits - center).div_(temperature), dim=-1)  # in place: a third array of that size less


def sinkhorn(log_scores: Tensor, iterations: int = 3, marginal: Tensor | None = None) -> Tensor:
    """Balanced assignment of rows to columns by Sinkhorn–Knopp in log space (Cuturi 2013; Caron et al. 2020).

    The iterations of SwAV, DINOv2 and MSN: columns (prototypes) first, then rows, and rows last. Their codes divide
    by the number of prototypes, of rows and by the overall sum on the way, which cancels. They exponentiate without
    taking out a maximum, so that float32 overflows at a logit of 88; this does not. MSN feeds a softmax (sharpened
    probabilities) instead of raw logits: pass its logarithm.

    Args:
        log_scores: ``(n, K)`` float32, already divided by the temperature.
        iterations: at least 1; each scales columns to their mass, then rows to 1.
        marginal: ``(K,)`` positive, the share of the rows that each column should get; None: equal ones.

    Returns:
        ``(n, K)``: rows sum to 1; every column's mass tends to ``n / K``, or n times its share. A column of -∞ stays
        at 0.

    Raises:
        ValueError: an empty batch, fewer than one iteration, or a marginal that does not fit or is not positive.
    """
    one_shape([log_scores], "log scores (rows, prototypes)")
    _check_iterations(iterations)
    log_p, shares = log_scores, log_shares(marginal, log_scores.shape[1], log_scores)
    lowest = torch.finfo(log_scores.dtype).min
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(dim=0, keepdim=True).clamp_min(lowest) + shares
        log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
    return log_p.exp()


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"Sinkhorn needs at least one iteration, got {iterations}")


@torch.no_grad()
def sinkhorn_offsets(
    z: Tensor,
    weight: Tensor,
    temperature: float,
    iterations: int = 3,
    bias: Tensor | None = None,
    group: Group = None,
    budget: int = BUDGET,
    marginal: Tensor | None = None,
    of_probabilities: bool = False,
    row_weight: Tensor | None = None,
) -> Tensor:
    """What `sinkhorn` adds to each column, without an ``(n, K)`` array.

    ``softmax(logits + offsets)`` with ``logits = z @ weight.T / temperature + bias`` is ``sinkhorn(logits)`` row by
    row, for these rows; so a loss that takes a bias of the teacher's logits needs no dense target.

    Over ``group``, column masses are all-reduced, K numbers an iteration: the result is that of one process with all
    rows, as in the distributed Sinkhorn of SwAV, DINOv2 and MSN.

    Args:
        z: ``(n, D)`` projections of this rank; computed in float32, or float64 where z or the weight are.
        weight: ``(K, D)`` prototypes.
        temperature: above 0.
        iterations: at least 1.
        bias: ``(K,)`` added after the temperature; a column at -∞ keeps offset 0.
        group: ranks with other rows and the same prototypes.
        budget: bytes of assignments held at once. Where all rows need more, they are taken in tiles, of 64 rows at
            least, and logits are formed again in every iteration.
        marginal: ``(K,)`` positive, the share of all rows that each prototype should get; None: equal ones.
        of_probabilities: start from ``softmax(logits)``, as MSN does, not from ``exp(logits)``, as SwAV and DINOv2 do:
            rows then weigh alike in the first iteration. Both tend to the same assignment.
        row_weight: ``(n,)`` ≥ 0, as how many rows each counts in the columns' masses.

    Returns:
        ``(K,)`` with mean 0 over all columns (adding a constant changes nothing), finite for any finite logits.

    Raises:
        ValueError: fewer than one iteration, a temperature that is not above 0, shapes that do not fit, or an empty
            batch (with ``group``, some ranks may have no rows), or a marginal that is not positive.
    """
    _check_iterations(iterations)
    above_zero(temperature)
    fits(z, weight, bias)
    if group is None:
        not_empty(len(z))
    dtype = torch.float64 if torch.float64 in (z.dtype, weight.dtype) else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        z, weight = z.to(dtype) / temperature, weight.to(dtype)
        constant = weight.new_zeros(len(weight)) if bias is None else bias.to(weight)

        def parameters(part: slice | Tensor) -> Tensor:
            return torch.cat([weight[part], constant[part].unsqueeze(-1)], dim=1)

        features = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        shares = log_shares(marginal, len(weight), constant)
        posterior = Posterior(features, Components(len(weight), parameters), torch.zeros_like(constant), budget)
        for i in range(iterations):
            log_mass = log_masses(
                posterior, group, raw=i == 0 and not of_probabilities, exact=True, row_weight=row_weight
            )
            change = torch.where(log_mass == -math.inf, 0.0, shares - log_mass)
            # A common constant falls out of every softmax; without it, offsets keep their digits.
            posterior.add(change - change.sum() / len(weight))
        return posterior.offset
