"""Cross-entropy between the teacher's and the student's assignments over pairs of views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Logits in flight at once: 16 MiB of float32, which stays near the processor."""


def dino_loss(student_logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean cross-entropy over all pairs (teacher view q, student view v) with q ≠ v (Caron et al. 2021, eq. 3).

    The targets of one student view are summed first, so each view's log-probabilities are made once.
    Use :func:`fused_dino_loss` for large K: it never holds a view's logits.

    Args:
        student_logits: one ``(n, K)`` per view, divided by the student's temperature; the views that the
            teacher saw come first, in the teacher's order.
        targets: one ``(n, K)`` per teacher view, rows summing to 1, no gradient.

    Returns:
        Scalar, in nats; ln K when the student knows nothing.
    """
    pairs = _pairs(len(student_logits), len(targets))
    total = student_logits[0].new_zeros(())
    everyone = torch.stack(list(targets)).sum(0)
    for v, logits in enumerate(student_logits):
        target = everyone - targets[v] if v < len(targets) else everyone
        total = total - (target * torch.log_softmax(logits, dim=-1)).sum(-1).mean()
    return total / pairs


def fused_dino_loss(
    z: Sequence[Tensor],
    weight: Tensor,
    targets: Sequence[Tensor],
    temperature: float,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`dino_loss` on logits ``z @ weight.T / temperature + bias`` that are never kept.

    The gradient is formed in the forward pass, block by block, so memory beyond the targets is a few
    blocks of rows whatever the number of views.

    Args:
        z: one ``(n, D)`` float32 per student view, the teacher's views first.
        weight: ``(K, D)``; gets a gradient where it requires one.
        targets: one ``(n, K)`` per teacher view, no gradient.
        temperature: the student's.
        bias: ``(K,)`` added to the logits after the temperature; no gradient.
    """
    _pairs(len(z), len(targets))
    loss: Tensor = _FusedCrossEntropy.apply(torch.stack(list(z)), weight, bias, temperature, *targets)
    return loss


def _pairs(views: int, teacher_views: int) -> int:
    pairs = views * teacher_views - min(views, teacher_views)
    if views < teacher_views or pairs < 1:
        raise ValueError(
            f"need every teacher view among the student's and one more view in all; "
            f"got {teacher_views} teacher and {views} student views"
        )
    return pairs


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, *targets: Tensor
    ) -> Tensor:
        views, n, _ = z.shape
        k = weight.shape[0]
        scale = 1.0 / (n * _pairs(views, len(targets)))
        grad_z = torch.empty_like(z) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=torch.float64, device=z.device)
        rows = max(1, _BLOCK // k)
        for start in range(0, n, rows):
            block = slice(start, start + rows)
            shown = [t[block] for t in targets]
            everyone = shown[0].clone() if len(shown) > 1 else shown[0]
            for t in shown[1:]:
                everyone += t
            for v in range(views):
                if v < len(shown):
                    # The sum over the other teacher views; with two of them that is just the other one.
                    others = shown[:v] + shown[v + 1 :]
                    if not others:
                        if grad_z is not None:
                            grad_z[v, block] = 0
                        continue
                    target = others[0] if len(others) == 1 else everyone - shown[v]
                else:
                    target = everyone
                logits = z[v, block] @ weight.T
                logits = logits.div_(temperature) if bias is None else logits.div_(temperature).add_(bias)
                mass = target.sum(-1, keepdim=True)
                log_sum = logits.logsumexp(-1, keepdim=True)
                cross = torch.linalg.vecdot(target, logits)
                loss += (mass * log_sum).double().sum() - cross.double().sum()
                if grad_z is None and grad_w is None:
                    continue
                error = logits.sub_(log_sum).exp_().mul_(mass).sub_(target)
                if grad_z is not None:
                    grad_z[v, block] = error @ weight
                if grad_w is not None:
                    grad_w.addmm_(error.T, z[v, block])
        factor = scale / temperature
        ctx.grads = (
            grad_z.mul_(factor) if grad_z is not None else None,
            grad_w.mul_(factor) if grad_w is not None else None,
        )
        return (loss * scale).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_z, grad_w = ctx.grads
        return (
            grad_z * grad if grad_z is not None else None,
            grad_w * grad if grad_w is not None else None,
            *[None] * (len(ctx.needs_input_grad) - 2),
        )
