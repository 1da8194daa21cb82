"""DINO's cross-entropy for heads that hand over logits: one pass over them, no log-probabilities kept.

For training loops of others, whose last layer is part of the head; our own step has the projections and never makes
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from uncollapse.checks import above_zero, one_shape
from uncollapse.losses.autograd import with_gradient
from uncollapse.losses.pairs import pair_count
from uncollapse.numerics import NEAR, blocks, exponent_floor, rows_at_once


def fused_dino_loss_on_logits(
    student_logits: Sequence[Tensor], targets: Sequence[Tensor], temperature: float = 1.0
) -> Tensor:
    """:func:`uncollapse.losses.pairs.dino_loss`, with the gradient of the logits formed in the forward pass.

    Memory beyond the arguments is that gradient, which has to be made anyway. Where projections and prototypes are
    at hand, :func:`uncollapse.losses.pairs.fused_dino_loss` needs neither logits nor their gradient in memory.

    Args:
        student_logits: one ``(n, K)`` per view, the teacher's views first. Half precision, as autocast hands over, is
            widened to float32, which takes a copy.
        targets: one ``(n, K)`` per teacher view, rows summing to 1, no gradient.
        temperature: the student's, above 0, by which the logits are divided here; 1 where they already are.

    Raises:
        ValueError: fewer student views than teacher views, no pair at all, an empty batch, shapes that differ, or a
            temperature that is not above 0.
    """
    above_zero(temperature)
    pair_count(len(student_logits), len(targets))
    one_shape([*student_logits, *targets], "logits and targets (images, prototypes)")
    dtype = reduce(torch.promote_types, (t.dtype for t in (*student_logits, *targets)), torch.float32)
    form = partial(_one_pass, temperature)
    loss: Tensor = with_gradient(form, [t.to(dtype) for t in student_logits], [t.to(dtype) for t in targets])
    return loss


def _one_pass(
    temperature: float, tensors: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    logits, targets = tensors[: len(needs)], tensors[len(needs) :]
    n, k = logits[0].shape
    scale = 1 / (temperature * n * pair_count(len(logits), len(targets)))
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None
        for x, needed in zip(logits, needs, strict=True)
    ]
    loss = torch.zeros((), dtype=torch.float64, device=logits[0].device)
    floor = temperature * exponent_floor(logits[0].dtype)
    few = min(n, rows_at_once(k, NEAR, 1, logits[0].device))
    spare = logits[0].new_empty(0 if all(needs) else few, k)
    for rows in blocks(n, few):
        shown = [t[rows] * -scale for t in targets]
        everyone = reduce(torch.add, shown)
        whole = everyone.sum(-1, keepdim=True)
        for v, view in enumerate(logits):
            x, gradient = view[rows], gradients[v]
            out = spare[: len(x)] if gradient is None else gradient[rows]
            minus, mass = everyone, whole
            if v < len(shown):
                others = [*shown[:v], *shown[v + 1 :]]
                if not others:
                    out.zero_()
                    continue
                minus = reduce(torch.add, others)
                mass = minus.sum(-1, keepdim=True)
            top = x.amax(-1, keepdim=True)
            torch.sub(x, top, out=out).clamp_(min=floor)
            if temperature != 1:
                out.mul_(1 / temperature)
            total = out.exp_().sum(-1, keepdim=True)
            log_sum = top + temperature * total.log()
            loss += torch.linalg.vecdot(minus, x).double().sum() - (mass * log_sum).double().sum()
            if gradient is not None:
                torch.addcmul(minus, out, -mass / total, out=out)
    return (loss.to(logits[0].dtype),), gradients
