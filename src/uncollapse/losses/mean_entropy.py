"""Mean-entropy maximisation: every prototype should get its share of the batch (Assran et al., MSN, ECCV 2022).

For training loops of others that have MSN's second term; none of our own methods has it so far.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uncollapse.checks import above_zero, fits, one_shape
from uncollapse.distributed import Group, rank_and_size, sum_over_ranks
from uncollapse.losses.autograd import first_order
from uncollapse.numerics import rows_at_once

_BLOCK = 1 << 22
"""Logits in flight at once: 16 MiB of float32."""


def me_max(z: Tensor, weight: Tensor, temperature: float, bias: Tensor | None = None, group: Group = None) -> Tensor:
    """``log K - H(p̄)`` with ``p̄`` the mean over rows, and over ranks, of the student's assignments (MSN, Section 3).

    No ``(n, K)`` array is kept: assignments are formed in blocks of rows, and again for the gradient.

    Args:
        z: ``(n, D)`` projections of the anchor views on this rank, n equal on all ranks.
        weight: ``(K, D)``.
        temperature: above 0, the student's.
        bias: ``(K,)`` added to the logits after the temperature; no gradient.
        group: ranks whose rows belong to the mean. The value is the same on all of them, and the average of
            their gradients, as data parallelism takes it, is the gradient of one process with all rows.

    Returns:
        Scalar in [0, log K] nats, float32, or float64 where z or ``weight`` is; 0 when the mean is uniform.

    Raises:
        ValueError: an empty batch, shapes that do not fit, or a temperature that is not above 0.
    """
    above_zero(temperature)
    one_shape([z], "projections (rows, dimensions)")
    fits(z, weight, bias)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    bias = None if bias is None else bias.detach().to(dtype)
    out: Tensor = _MeMax.apply(z.to(dtype), weight.to(dtype), bias, temperature, group)
    return out


def _blocks(z: Tensor, weight: Tensor) -> list[slice]:
    rows = rows_at_once(len(weight), _BLOCK)
    return [slice(start, start + rows) for start in range(0, len(z), rows)]


def _assignments(z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = (z @ weight.T).div_(temperature)
    return torch.softmax(logits if bias is None else logits.add_(bias), dim=-1)


class _MeMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, group: Group) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            mean = torch.zeros(len(weight), dtype=z.dtype, device=z.device)
            for block in _blocks(z, weight):
                mean += _assignments(z[block], weight, bias, temperature).sum(0)
            mean = sum_over_ranks(mean, group) / (len(z) * rank_and_size(group)[1])
        ctx.save_for_backward(z, weight, bias, mean)
        ctx.temperature = temperature
        return math.log(len(weight)) - torch.special.entr(mean).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, mean = ctx.saved_tensors
        grad_z = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        # d(-H)/dp̄ is log p̄ + 1; the constant falls out of the softmax's Jacobian. A prototype that got nothing at
        # all passes no gradient, as its probabilities are 0.
        slope = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        with torch.autocast(z.device.type, enabled=False):
            for block in _blocks(z, weight):
                p = _assignments(z[block], weight, bias, ctx.temperature)
                error = p * (slope - (p @ slope).unsqueeze(-1))
                # Over the local rows only: the average over ranks makes it the global mean's gradient.
                error *= grad / (len(z) * ctx.temperature)
                if grad_z is not None:
                    grad_z[block] = error @ weight
                if grad_w is not None:
                    grad_w.addmm_(error.T, z[block])
        return grad_z, grad_w, None, None, None
