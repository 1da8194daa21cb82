"""Cross-entropy between the averages of several heads' assignments (WE-SSL's PROB; Ruan et al. 2023, eq. 7)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from uncollapse.losses.autograd import with_gradient
from uncollapse.losses.pairs import pair_count
from uncollapse.numerics import rows_at_once
from uncollapse.targets.softmax import SoftmaxTargets


class Head(NamedTuple):
    """What one head of the student assigns by, and its teacher's targets."""

    z: Tensor
    """``(V, n, D)``: projections of the student's views, those that the teacher saw first."""
    weight: Tensor
    """``(K, D)``: gets a gradient where it requires one."""
    bias: Tensor | None
    """``(K,)``: after the temperature; gets a gradient where it requires one."""
    targets: SoftmaxTargets
    """With z ``(T, n, D)``."""


def fused_mean_loss(heads: Sequence[Head], temperature: float) -> Tensor:
    """Mean of ``-Σ_k t̄_k log s̄_k`` over images and pairs of a teacher view and another view; bars: means over heads.

    The k-th prototypes of all heads are one class here. No ``(n, K)`` array outlives a block of rows, of which there is
    one for each head; the gradient is formed on the way.

    Args:
        heads: at least one, with the same number of views, images and prototypes.
        temperature: the student's, above 0.

    Returns:
        Scalar, in nats; ln K when the student knows nothing.

    Raises:
        ValueError: shapes that differ, or no pair.
    """
    shapes = {
        (head.z.shape[:2], head.targets.z.shape[:2], len(head.weight), len(head.targets.weight)) for head in heads
    }
    if len(shapes) != 1:
        raise ValueError(f"all heads need the same views, images and prototypes; there are {len(shapes)} kinds")
    pair_count(len(heads[0].z), len(heads[0].targets.z))
    learned = [part for head in heads for part in (head.z, head.weight, head.bias)]
    fixed = [part for head in heads for part in (head.targets.z, head.targets.weight, head.targets.bias)]
    sharp = [head.targets.temperature for head in heads]
    loss: Tensor = with_gradient(functools.partial(_sum_blocks, temperature, sharp), learned, fixed)
    return loss


def _sum_blocks(
    temperature: float, sharp: list[float], tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    count = len(sharp)
    student, teacher = _by_three(tensors[: 3 * count]), _by_three(tensors[3 * count :])
    views, images, _ = student[0][0].shape
    seen, k = len(teacher[0][0]), len(student[0][1])
    scale = 1 / (images * pair_count(views, seen))
    gradients = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needs, strict=False)]
    total = torch.zeros((), dtype=torch.float64, device=student[0][0].device)
    for part in torch.arange(images).split(rows_at_once(k * (count + seen), least=8)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        mean = _mean_targets(teacher, sharp, rows)
        everyone = mean.sum(0)
        for v in range(views):
            target = everyone - mean[v] if v < seen else everyone
            logs = torch.stack([_log_softmax(z[v, rows], w, b, temperature) for z, w, b in student])
            average = logs.logsumexp(0) - math.log(count)
            total -= (target * average).double().sum()
            for h, (z, w, _) in enumerate(student):
                # d/dlogits of -Σ T log s̄ is p Σ (T r) - T r, with r this head's share of s̄.
                pulled = target * (logs[h] - average).exp() / count
                error = (logs[h].exp() * pulled.sum(-1, keepdim=True) - pulled) * scale
                grad_z, grad_w, grad_b = gradients[3 * h : 3 * h + 3]
                if grad_z is not None:
                    grad_z[v, rows] = error @ w / temperature
                if grad_w is not None:
                    grad_w.addmm_(error.T, z[v, rows] / temperature)
                if grad_b is not None:
                    grad_b += error.sum(0)
    return ((total * scale).to(student[0][0].dtype),), gradients


def _mean_targets(teacher: list[tuple[Any, ...]], sharp: list[float], rows: slice) -> Tensor:
    """``(T, rows, K)``: of some images."""
    every = (SoftmaxTargets(z[:, rows], w, t, b).dense() for (z, w, b), t in zip(teacher, sharp, strict=True))
    total = functools.reduce(torch.add, every)
    return total / len(sharp)


def _log_softmax(z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = z @ weight.T / temperature
    return torch.log_softmax(logits if bias is None else logits + bias, dim=-1)


def _by_three(tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
