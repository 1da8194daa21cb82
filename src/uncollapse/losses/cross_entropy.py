"""Cross-entropy between softmax assignments to K prototypes, with no ``(n, K)`` array that outlives a block of rows.

Written out, ``CE(t, s) = mass(t) · log Σ_k exp s_k - Σ_k t_k s_k`` with ``s = W x / τ + b``. The second term is linear
in s, so ``Σ_k t_k s_k = (t W) · x / τ + t · b``: the targets enter by one product with the prototypes, however many
student views share them, and each student row needs one pass of exponentials. The gradient is formed on the way.

Not ``torch.compile``: the time is in the matrix products, the passes around them already run in place on what the
processor holds, and a compiled block costs seconds at the start and a C++ compiler on the user's machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncollapse.checks import above_zero, has_shape, usable_weights
from uncollapse.losses.autograd import with_gradient
from uncollapse.numerics import IN_FLIGHT, NEAR, blocks, exponent_floor, rows_at_once
from uncollapse.targets.softmax import SoftmaxTargets

Targets = Sequence[Tensor] | SoftmaxTargets


def fused_cross_entropy(
    z: Tensor,
    weight: Tensor,
    targets: Targets,
    temperature: float,
    pairing: Tensor,
    row_weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``Σ_i a_i Σ_{v,q} pairing[v, q] · CE(t_{q,i}, s_{v,i})`` with ``s = softmax(z · w_k / temperature + bias_k)``.

    Args:
        z: ``(V, n, D)``, the student's projections.
        weight: ``(K, D)``; gets a gradient where it requires one, like z and ``bias``.
        targets: T arrays ``(n, K)`` with rows summing to 1, or :class:`SoftmaxTargets` with z ``(T, n, D)``; no
            gradient.
        temperature: the student's, above 0.
        pairing: ``(V, T)``, how much the pair of student view v and teacher view q counts; 0 or above.
        row_weight: ``(n,)``, how much image i counts, or ``(n, T)``, how much it does with each teacher view; 0 or
            above; no gradient.
        bias: ``(K,)``, finite, added after the temperature.

    Returns:
        Scalar, in nats; float32, or float64 where z or ``weight`` is. 0 where n is 0.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not above 0, or a negative or infinite weight (where
            weights are on a CPU).
    """
    above_zero(temperature)
    dtype = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
    soft = isinstance(targets, SoftmaxTargets)
    parts: list[Tensor | None] = (
        [*targets] if not isinstance(targets, SoftmaxTargets) else [targets.z, targets.weight, targets.bias]
    )
    _check(z, weight, parts, soft, pairing, row_weight, bias)
    rule = _Rule(
        temperature,
        targets.temperature if isinstance(targets, SoftmaxTargets) else None,
        pairing.detach().to(z.device, dtype),
        row_weight.detach().to(z.device, dtype),
    )
    parts = [None if x is None else x.detach().to(dtype) for x in parts]
    bias = None if bias is None else bias.to(dtype)
    # One student view for one teacher view shares nothing: summing errors row by row saves two products.
    matched = tuple(pairing.shape) == (1, 1) and row_weight.ndim == 1
    form = functools.partial(_sum_matched if matched else _sum_blocks, rule)
    loss: Tensor = with_gradient(form, (z.to(dtype), weight.to(dtype), bias), parts)
    return loss


def _check(
    z: Tensor,
    weight: Tensor,
    parts: list[Tensor | None],
    soft: bool,
    pairing: Tensor,
    row_weight: Tensor,
    bias: Tensor | None,
) -> None:
    first = parts[0] if parts else None
    if first is None:
        raise ValueError("no targets")
    if z.ndim != 3 or first.ndim != (3 if soft else 2):
        raise ValueError(
            f"z must be (views, images, dimensions), got {tuple(z.shape)}; the targets "
            f"{'(views, images, dimensions)' if soft else '(images, prototypes) each'}, got {tuple(first.shape)}"
        )
    views, n, dim = z.shape
    count = len(first) if soft else len(parts)
    rows, k = (first.shape[1], len(parts[1])) if soft and parts[1] is not None else tuple(first.shape)
    wanted = ((views, count), (n,), n, len(weight), dim)
    got = (tuple(pairing.shape), tuple(row_weight.shape[:1]), rows, k, weight.shape[1])
    if wanted != got:
        names = ("pairing", "row_weight", "images of the targets", "prototypes of the targets", "length of a prototype")
        wrong = [f"{name} is {g}, not {w}" for name, g, w in zip(names, got, wanted, strict=True) if g != w]
        raise ValueError("; ".join(wrong))
    if not soft and (odd := [tuple(t.shape) for t in parts if t is not None and t.shape != (n, len(weight))]):
        raise ValueError(f"targets must be {(n, len(weight))} each, images by prototypes; one is {odd[0]}")
    has_shape(bias, (len(weight),), "bias")
    has_shape(row_weight if row_weight.ndim > 1 else None, (n, count), "row_weight")
    usable_weights(pairing, "pairing")
    usable_weights(row_weight, "row_weight")


@dataclass(frozen=True)
class _Rule:
    temperature: float
    target_temperature: float | None
    """None where the targets are arrays."""
    pairing: Tensor
    row_weight: Tensor


def _sum_blocks(
    rule: _Rule, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    z, weight, bias, *parts = tensors
    pairing, image_weight = rule.pairing, rule.row_weight
    x = z.transpose(0, 1).contiguous()  # (n, V, D)
    n, views, dim = x.shape
    count = pairing.shape[1]

    grad_x = torch.empty_like(x) if needs[0] else None
    grad_w = torch.zeros_like(weight) if needs[1] else None
    grad_b = torch.zeros_like(bias) if bias is not None and needs[2] else None
    # Half of it would be 64 rows of 65,536 prototypes, a fifth slower.
    most = rows_at_once(len(weight), 2 * IN_FLIGHT, device=weight.device)
    buffer = x.new_empty(min(max(1, n * max(views, count)), most), len(weight))

    # The targets' side: Σ a t·s, with all student views that target t is paired with summed beforehand.
    partner = (pairing.T @ x).view(n * count, dim)
    pulled = x.new_empty(n * count, dim)
    mass = x.new_ones(n * count)
    weights_t = image_weight.repeat_interleave(count) if image_weight.ndim == 1 else image_weight.reshape(-1)
    times = pairing.sum(0).repeat(n)
    shared = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, t, factor in _target_blocks(rule, parts, x, buffer):
        if factor is None:
            mass[rows] = t.sum(-1)
            a = weights_t[rows]
        else:
            a = weights_t[rows] * factor
        pulled[rows] = (t @ weight).mul_((a / rule.temperature).unsqueeze(1))
        shared += torch.linalg.vecdot(pulled[rows], partner[rows]).double().sum()
        if bias is not None:
            shared += ((t @ bias) * a * times[rows]).double().sum()
        if grad_w is not None:
            grad_w.addmm_(t.T, partner[rows] * (a / rule.temperature).unsqueeze(1), alpha=-1)
        if grad_b is not None:
            grad_b.addmv_(t.T, a * times[rows], alpha=-1)
    if grad_x is not None:
        torch.matmul(pairing, pulled.view(n, count, dim), out=grad_x).neg_()

    # The student's side: Σ a mass log Σ exp s.
    x = x.view(n * views, dim)
    if image_weight.ndim == 1:
        weights_s = (image_weight.unsqueeze(1) * (mass.view(n, count) @ pairing.T)).view(-1)
    else:
        weights_s = ((image_weight * mass.view(n, count)) @ pairing.T).view(-1)
    loss = torch.zeros_like(shared)
    for rows in blocks(n * views, len(buffer)):
        p, log_sum, factor = _exponentials(x[rows], weight, bias, rule.temperature, buffer)
        loss += (weights_s[rows] * log_sum).double().sum()
        a = weights_s[rows] * factor
        if grad_x is not None:
            grad_x.view(n * views, dim)[rows] += (p @ weight).mul_((a / rule.temperature).unsqueeze(1))
        if grad_w is not None:
            grad_w.addmm_(p.T, x[rows] * (a / rule.temperature).unsqueeze(1))
        if grad_b is not None:
            grad_b.addmv_(p.T, a)

    grad_z = None if grad_x is None else grad_x.transpose(0, 1)
    return ((loss - shared).to(x.dtype),), [grad_z, grad_w, grad_b]


def _sum_matched(
    rule: _Rule, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    """The same as `_sum_blocks` for one view of each: the error ``p - t`` is formed in place of the logits."""
    z, weight, bias, *parts = tensors
    x, weights = z[0].contiguous(), rule.row_weight * rule.pairing[0, 0]
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_w = torch.zeros_like(weight) if needs[1] else None
    grad_b = torch.zeros_like(bias) if bias is not None and needs[2] else None
    # There are two blocks: at the largest K, of half the rows.
    step = rows_at_once(len(weight), 2 * IN_FLIGHT, 32, device=weight.device)
    buffer, spare = x.new_empty(2, min(max(1, len(x)), step), len(weight)).unbind()
    loss, shared = torch.zeros(2, dtype=torch.float64, device=x.device).unbind()
    for rows, t, factor_t in _target_blocks(rule, parts, x, spare):
        a = weights[rows]
        s = _logits(x[rows], weight, bias, rule.temperature, buffer)
        if factor_t is None:
            factor_t, mass = torch.ones_like(a), t.sum(-1)
        else:
            mass = torch.ones_like(a)
        shared += (a * factor_t * torch.linalg.vecdot(t, s)).double().sum()
        log_sum, factor_s = _exponentiate(s)
        loss += (a * mass * log_sum).double().sum()
        error = s.mul_((a * mass * factor_s).unsqueeze(1)).addcmul_(t, (a * factor_t).unsqueeze(1), value=-1)
        if grad_x is not None:
            grad_x[rows] = (error @ weight).div_(rule.temperature)
        if grad_w is not None:
            grad_w.addmm_(error.T, x[rows] / rule.temperature)
        if grad_b is not None:
            grad_b += error.sum(0)
    return ((loss - shared).to(x.dtype),), [None if grad_x is None else grad_x.unsqueeze(0), grad_w, grad_b]


def _target_blocks(
    rule: _Rule, parts: Sequence[Tensor | None], x: Tensor, buffer: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Blocks of targets: their places among ``(image, teacher view)``, ``(rows, K)``, and what to multiply them by."""
    count = rule.pairing.shape[1]
    if rule.target_temperature is None:
        for q, t in enumerate(parts):
            assert t is not None
            for rows in blocks(len(x), len(buffer)):
                yield slice(rows.start * count + q, rows.stop * count, count), t[rows], None
        return
    z, weight, bias = parts
    assert z is not None
    assert weight is not None
    z = z.transpose(0, 1).reshape(-1, z.shape[2])
    for rows in blocks(len(z), len(buffer)):
        t, _, factor = _exponentials(z[rows], weight, bias, rule.target_temperature, buffer)
        yield rows, t, factor


def _exponentials(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, buffer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's softmax before its rows are divided by their sums, which its users do on the short side.

    Returns:
        ``(rows, K)`` exponentials in ``buffer``, valid until the next call; the rows' log-sum-exp; the factor
        ``(rows,)`` that makes softmax of the exponentials.
    """
    out = _logits(x, weight, bias, temperature, buffer)
    return out, *_exponentiate(out)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, buffer: Tensor) -> Tensor:
    out = buffer[: len(x)]
    if bias is None:
        return torch.mm(x / temperature, weight.T, out=out)
    return torch.addmm(bias, x / temperature, weight.T, out=out)


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """In place; the rows' float64 log-sum-exp, and the factor that makes softmax of the exponentials."""
    n, k = logits.shape
    top, total = logits.new_empty(n), logits.new_empty(n)
    lowest, floor = torch.finfo(logits.dtype).min, exponent_floor(logits.dtype)
    for rows in blocks(n, rows_at_once(k, NEAR, 1, logits.device)):
        part = logits[rows]
        torch.amax(part, dim=-1, out=top[rows])
        top[rows].clamp_(min=lowest)  # a row whose prototypes are all ruled out
        part.sub_(top[rows].unsqueeze(1)).clamp_(min=floor).exp_()
        torch.sum(part, dim=-1, out=total[rows])
    # Not exp(top - log_sum): of logits with a large common part that would lose all the digits behind it.
    return top.double() + total.double().log(), 1 / total
