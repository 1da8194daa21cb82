"""The student's mean prediction: every prototype should get its share of the batch (Assran et al., MSN, ECCV 2022)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.checks import above_zero, fits, one_shape
from uncollapse.distributed import Group, rank_and_size, sum_over_ranks
from uncollapse.losses.autograd import first_order, with_gradient
from uncollapse.numerics import blocks, rows_at_once
from uncollapse.targets.prior import log_shares


def me_max(
    z: Tensor,
    weight: Tensor,
    temperature: float,
    bias: Tensor | None = None,
    group: Group = None,
    prior: Tensor | None = None,
) -> Tensor:
    """``log K - H(p̄)`` with ``p̄`` the mean over rows, and over ranks, of the student's assignments (MSN, Section 3).

    With a prior it is ``KL(p̄ ‖ prior)``, of which this is the uniform case: PMSN's term (Assran et al., *The Hidden
    Uniform Cluster Prior in Self-Supervised Learning*, ICLR 2023). The lightly library takes that divergence the other
    way round.

    No ``(n, K)`` array is kept: assignments are formed in blocks of rows, and again for the gradient.

    Args:
        z: ``(n, D)`` projections of the anchor views on this rank, n equal on all ranks.
        weight: ``(K, D)``.
        temperature: above 0, the student's.
        bias: ``(K,)`` added to the logits after the temperature; no gradient.
        group: ranks whose rows belong to the mean. The value is the same on all of them, and the average of
            their gradients, as data parallelism takes it, is the gradient of one process with all rows.
        prior: ``(K,)`` positive, sums to 1; no gradient. None: uniform.

    Returns:
        Scalar of 0 or above in nats, float32, or float64 where z or ``weight`` is; 0 when the mean is the prior, and
        at most log K where that is uniform.

    Raises:
        ValueError: an empty batch, shapes that do not fit, a temperature that is not above 0, or a prior that is not
            positive.
    """
    above_zero(temperature)
    one_shape([z], "projections (rows, dimensions)")
    fits(z, weight, bias)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    bias = None if bias is None else bias.detach().to(dtype)
    wide = weight.to(dtype)
    log_prior = None if prior is None else log_shares(prior, len(weight), wide)
    out: Tensor = _MeMax.apply(z.to(dtype), wide, bias, temperature, group, log_prior)
    return out


def prediction_entropy(z: Tensor, weight: Tensor, temperature: float, bias: Tensor | None = None) -> Tensor:
    """Mean over rows of the entropy of the student's assignments: MSN's third term, which makes predictions sure.

    No ``(n, K)`` array is kept.

    Args:
        z: ``(n, D)`` projections.
        weight: ``(K, D)``; gets a gradient where it requires one, like z.
        temperature: above 0.
        bias: ``(K,)`` added to the logits after the temperature; no gradient.

    Returns:
        Scalar in [0, log K] nats, float32, or float64 where z or ``weight`` is.

    Raises:
        ValueError: an empty batch, shapes that do not fit, or a temperature that is not above 0.
    """
    above_zero(temperature)
    one_shape([z], "projections (rows, dimensions)")
    fits(z, weight, bias)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    bias = None if bias is None else bias.detach().to(dtype)
    form = functools.partial(_sum_entropies, temperature)
    out: Tensor = with_gradient(form, (z.to(dtype), weight.to(dtype)), (bias,))
    return out


def _sum_entropies(
    temperature: float, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    z, weight, bias = tensors
    grad_z = torch.empty_like(z) if needs[0] else None
    grad_w = torch.zeros_like(weight) if needs[1] else None
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for block in blocks(len(z), rows_at_once(len(weight))):
        p = _assignments(z[block], weight, bias, temperature)
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        entropy = -torch.linalg.vecdot(p, log_p)
        total += entropy.double().sum()
        error = p.mul_(log_p.add_(entropy.unsqueeze(-1))).div_(-len(z) * temperature)
        if grad_z is not None:
            grad_z[block] = error @ weight
        if grad_w is not None:
            grad_w.addmm_(error.T, z[block])
    return ((total / len(z)).to(z.dtype),), [grad_z, grad_w]


def _assignments(z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = (z @ weight.T).div_(temperature)
    return torch.softmax(logits if bias is None else logits.add_(bias), dim=-1)


class _MeMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        group: Group,
        log_prior: Tensor | None,
    ) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            mean = torch.zeros(len(weight), dtype=z.dtype, device=z.device)
            for block in blocks(len(z), rows_at_once(len(weight))):
                mean += _assignments(z[block], weight, bias, temperature).sum(0)
            mean = sum_over_ranks(mean, group) / (len(z) * rank_and_size(group)[1])
        ctx.save_for_backward(z, weight, bias, mean, log_prior)
        ctx.temperature = temperature
        cross = math.log(len(weight)) if log_prior is None else -(mean @ log_prior)
        return cross - torch.special.entr(mean).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, mean, log_prior = ctx.saved_tensors
        grad_z = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # d(-H)/dp̄ is log p̄ + 1; the constant falls out of the softmax's Jacobian. A prototype that got nothing at
        # all passes no gradient, as its probabilities are 0.
        slope = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        slope = slope if log_prior is None else slope - log_prior
        with torch.autocast(z.device.type, enabled=False):
            for block in blocks(len(z), rows_at_once(len(weight))):
                p = _assignments(z[block], weight, bias, ctx.temperature)
                error = p * (slope - (p @ slope).unsqueeze(-1))
                # Over the local rows only: the average over ranks makes it the global mean's gradient.
                error *= grad / (len(z) * ctx.temperature)
                if grad_z is not None:
                    grad_z[block] = error @ weight
                if grad_w is not None:
                    grad_w.addmm_(error.T, z[block])
        return grad_z, grad_w, None, None, None, None
