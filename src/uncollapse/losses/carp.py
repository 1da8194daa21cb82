"""CARP's objective: agreement inside random blocks of prototypes (Silva & Ramírez Rivera, NeurIPS 2023).

Every step the K prototypes are dealt at random into blocks of N_B. Within a block b, student and teacher views take a
softmax over its prototypes alone, and the loss is

    mean over b, images and pairs (v ≠ q) of  -log⟨p_{v,b}, q_{q,b}⟩   +   mean over b of  log N_B - H(p̄_b),

an inner product rather than a cross-entropy, with p̄_b the mean over all student *and* teacher rows of all views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncollapse.checks import above_zero, fits, one_shape
from uncollapse.distributed import Group, rank_and_size, same_everywhere, sum_over_ranks
from uncollapse.losses.autograd import with_gradient
from uncollapse.losses.pairs import pair_count
from uncollapse.numerics import exponent_floor, rows_at_once
from uncollapse.targets.softmax import SoftmaxTargets


def random_blocks(count: int, size: int, seed: int, step: int) -> Tensor:
    """``(count // size, size)`` int64: prototypes dealt into blocks, the same on every rank and device.

    Args:
        count: K.
        size: N_B, at least 2 and at most K. Where it does not divide K, the rest sit this step out, as in CARP.
        seed: of the run.
        step: any integer ≥ 0; another step, another deal.

    Raises:
        ValueError: ``size`` out of range.
    """
    if not 2 <= size <= count:
        raise ValueError(f"blocks of {size} cannot be dealt from {count} prototypes")
    return torch.randperm(count, generator=same_everywhere(seed, step))[: count - count % size].view(-1, size)


def carp_loss(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], blocks: Tensor, entropy_weight: float = 1.0
) -> Tensor:
    """CARP's loss on logits: the form to read, which keeps every view's probabilities.

    Args:
        student_logits: one ``(n, K)`` per view, the teacher's views first. CARP's are raw: no temperature, and
            neither side of the product is normalised.
        teacher_logits: one ``(n, K)`` per teacher view; no gradient.
        blocks: ``(blocks, N_B)`` int64 from :func:`random_blocks`.
        entropy_weight: of the second term; 1 in CARP.

    Returns:
        Scalar. Inner products are clamped to [ε, 1 - ε], ε the dtype's, so hopeless pairs get no gradient.

    Raises:
        ValueError: fewer student views than teacher views, no pair at all, an empty batch, shapes that differ, or
            blocks that name other prototypes.
    """
    pairs = pair_count(len(student_logits), len(teacher_logits))
    one_shape([*student_logits, *teacher_logits], "logits (images, prototypes)")
    _check_blocks(blocks, student_logits[0].shape[1])
    p = [torch.softmax(logits[:, blocks], dim=-1) for logits in student_logits]
    q = [torch.softmax(logits.detach()[:, blocks], dim=-1) for logits in teacher_logits]
    eps = torch.finfo(p[0].dtype).eps
    consistency = p[0].new_zeros(())
    for i, student in enumerate(p):
        for j, teacher in enumerate(q):
            if i != j:
                consistency = consistency - (student * teacher).sum(-1).clamp(eps, 1 - eps).log().mean()
    mean = torch.cat([*p, *q]).mean(0)
    entropy = math.log(blocks.shape[1]) + (mean * mean.clamp(eps, 1 - eps).log()).sum(-1).mean()
    return consistency / pairs + entropy_weight * entropy


def fused_carp_loss(
    z: Sequence[Tensor],
    weight: Tensor,
    targets: SoftmaxTargets,
    blocks: Tensor,
    entropy_weight: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """:func:`carp_loss` with a few blocks of prototypes in memory at a time and the gradient formed in forward.

    :func:`fused_carp_terms` is the same with its second term told apart.

    Args:
        z: one ``(n, D)`` per student view, the teacher's views first.
        weight: ``(K, D)``; gets a gradient where it requires one (rows outside ``blocks`` get zeros).
        targets: the teacher's side, z ``(T, n, D')`` of any length, softmax inside each block; no gradient. Their
            temperature is 1 in CARP.
        blocks: ``(blocks, N_B)`` int64 from :func:`random_blocks`, the same on all ranks.
        entropy_weight: of the second term; 1 in CARP.
        temperature: the student's, above 0; 1 in CARP.
        bias: ``(K,)`` added after the temperature; no gradient.
        group: ranks with images of their own and all K prototypes each. p̄ is then taken over all ranks' rows; the
            loss returned is that of this rank's pairs plus the shared second term, and the mean of gradients over
            ranks, which DDP forms, is the gradient of the mean loss. As many images on every rank.

    Returns:
        Scalar, in nats; float32, or float64 where z or ``weight`` is.

    Raises:
        ValueError: fewer student views than teacher views, no pair at all, an empty batch, shapes that do not fit, a
            temperature that is not above 0, or blocks that name other prototypes.
    """
    return fused_carp_terms(z, weight, targets, blocks, entropy_weight, temperature, bias, group)[0]


def fused_carp_terms(
    z: Sequence[Tensor],
    weight: Tensor,
    targets: SoftmaxTargets,
    blocks: Tensor,
    entropy_weight: float = 1.0,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fused_carp_loss`, and the part of it that the second term makes up, as a number without gradient."""
    above_zero(temperature)
    if targets.z.ndim != 3:
        raise ValueError(f"the targets' z must be (views, images, dimensions), got {tuple(targets.z.shape)}")
    pair_count(len(z), len(targets.z))
    one_shape(z, "views (images, dimensions)")
    x = torch.stack(list(z))
    fits(x, weight, bias)
    _check_blocks(blocks, len(weight))
    if targets.z.shape[1] != x.shape[1] or len(targets.weight) != len(weight):
        raise ValueError(
            f"student: {x.shape[1]} images, {len(weight)} prototypes; "
            f"teacher: {targets.z.shape[1]} images, {len(targets.weight)} prototypes"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    fixed = [None if t is None else t.detach().to(dtype) for t in (bias, targets.z, targets.weight, targets.bias)]
    rule = _Rule(temperature, targets.temperature, entropy_weight, group)
    form = functools.partial(_sum_blocks, rule)
    loss, entropy = with_gradient(form, (x.to(dtype), weight.to(dtype)), (blocks.to(x.device), *fixed))
    return loss, entropy


def _check_blocks(blocks: Tensor, count: int) -> None:
    if blocks.ndim != 2 or blocks.dtype != torch.long or 0 in blocks.shape:
        raise ValueError(f"blocks are int64 (blocks, N_B), got {blocks.dtype} of shape {tuple(blocks.shape)}")
    if blocks.device.type == "cpu" and (int(blocks.min()) < 0 or int(blocks.max()) >= count):
        raise ValueError(f"blocks name prototypes 0 to {count - 1}, got {int(blocks.min())} to {int(blocks.max())}")


class _Rule(NamedTuple):
    temperature: float
    teacher_temperature: float
    entropy_weight: float
    group: Group


def _sum_blocks(
    rule: _Rule, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    temperature, teacher_temperature, entropy_weight, group = rule
    z, weight, blocks, bias, z_teacher, weight_teacher, bias_teacher = tensors
    views, n, dim = z.shape
    seen = len(z_teacher)
    count, size = blocks.shape
    eps = torch.finfo(z.dtype).eps
    each = 1 / (count * n * pair_count(views, seen))  # what one inner product counts
    rows = n * (views + seen)
    x, y = z.reshape(views * n, dim) / temperature, z_teacher.flatten(0, 1) / teacher_temperature

    consistency = torch.zeros((), dtype=torch.float64, device=z.device)
    entropy = torch.zeros_like(consistency)
    grad_z = torch.zeros_like(x) if needs[0] else None
    # Unless each prototype has its block, some rows are never written.
    grad_w = (torch.empty_like if blocks.numel() == len(weight) else torch.zeros_like)(weight) if needs[1] else None
    # Two arrays of all views' probabilities while they are formed, and two of one view's in the first term.
    at_once = rows_at_once(2 * (views + seen + 1) * n * size, least=1, device=z.device)
    for start in range(0, count, at_once):
        chosen = blocks[start : start + at_once].reshape(-1)
        w = weight[chosen]
        p = _probabilities(x, w, bias, chosen, size).view(views, n, -1, size)
        q = _probabilities(y, weight_teacher[chosen], bias_teacher, chosen, size).view(seen, n, -1, size)
        # Second term: every row of the mean has the same slope.
        total = sum_over_ranks(p.sum((0, 1)) + q.sum((0, 1)), group)
        mean = total / (rows * rank_and_size(group)[1])
        log_mean = mean.clamp(eps, 1 - eps).log()
        entropy += entropy_weight / count * (mean.shape[0] * math.log(size) + (mean * log_mean).double().sum())
        inside = (mean >= eps) & (mean <= 1 - eps)
        slope = (log_mean + inside) * (entropy_weight / (count * rows))
        # First term, then the softmax's own derivative: p (g - ⟨p, g⟩).
        for v in range(views):
            g = slope.expand(n, -1, -1).clone()
            for j in range(seen):
                if v != j:
                    inner = torch.linalg.vecdot(p[v], q[j])
                    held = inner.clamp(eps, 1 - eps)
                    consistency -= each * held.log().double().sum()
                    g.addcmul_(q[j], torch.where(inner == held, 1 / held, 0).unsqueeze(-1), value=-each)
            g -= torch.linalg.vecdot(p[v], g).unsqueeze(-1)
            p[v].mul_(g)
        error = p.view(views * n, -1)
        if grad_z is not None:
            grad_z.addmm_(error, w, alpha=1 / temperature)
        if grad_w is not None:
            grad_w[chosen] = error.T @ x
    gradients = [None if grad_z is None else grad_z.view_as(z), grad_w]
    return ((consistency + entropy).to(z.dtype), entropy.to(z.dtype)), gradients


def _probabilities(x: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, size: int) -> Tensor:
    """``(rows, blocks, N_B)``, softmax in each block."""
    logits = x @ weight.T if bias is None else torch.addmm(bias[chosen], x, weight.T)
    logits = logits.view(len(x), -1, size)
    logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=exponent_floor(x.dtype))
    return torch.softmax(logits, dim=-1)
