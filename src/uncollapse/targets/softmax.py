"""The teacher's targets, made where they are used: softmax rows that are never stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uncollapse.checks import above_zero, fits
from uncollapse.numerics import rows_at_once


@dataclass(frozen=True)
class SoftmaxTargets:
    """Targets ``softmax_k(z · w_k / temperature + bias_k)`` that are made where they are used and never stored.

    DINO's centre is a bias of ``-center / temperature``, a Sinkhorn or mixture posterior one of per-prototype
    offsets, a vMF model one of log-normalisers. No gradient reaches any of the parts.

    Attributes:
        z: ``(T, n, D)`` for T teacher views, ``(T, n, R, D)`` for R regions of each, ``(M, D)`` for M patches; the
            teacher's projections.
        weight: ``(K, D)``, the teacher's prototypes.
        temperature: the teacher's, above 0.
        bias: ``(K,)``, added after the division by the temperature; -inf rules a prototype out.
        features: ``(T, n, ..., d)``, what the encoder made of the same views, where the method matches by it.

    Raises:
        ValueError: a temperature that is not above 0, or shapes that do not fit.
    """

    z: Tensor
    weight: Tensor
    temperature: float
    bias: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        above_zero(self.temperature, "the targets' temperature")
        fits(self.z, self.weight, self.bias, "the targets' ")

    def dense(self) -> Tensor:
        """The same targets as an array ``(..., K)``, float32, or float64 where a part is: for small K and for tests."""
        with torch.no_grad(), torch.autocast(self.z.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(self.z.dtype, self.weight.dtype), torch.float32)
            logits = self.z.to(dtype) @ self.weight.to(dtype).T / self.temperature
            return torch.softmax(logits if self.bias is None else logits + self.bias.to(dtype), dim=-1)

    def blocks(self) -> Iterator[Tensor]:
        """:meth:`dense` of some rows after the others, ``(n, K)`` each: as many as are good for one block."""
        for rows in self.z.flatten(0, -2).split(rows_at_once(len(self.weight))):
            yield SoftmaxTargets(rows, self.weight, self.temperature, self.bias).dense()


@torch.no_grad()
def entropies(targets: SoftmaxTargets) -> tuple[float, float]:
    """Mean entropy of a row, and entropy of the mean row, in nats; a block of rows at a time.

    The second is near ln K whenever the assignment is balanced, collapsed or not; it is logged to be compared with the
    number of *unique* prototypes.
    """
    n, total, mean = targets.z.shape[:-1].numel(), targets.z.new_zeros(()), targets.z.new_zeros(len(targets.weight))
    for p in targets.blocks():
        total += torch.special.entr(p).sum()
        mean += p.sum(0)
    return float(total / n), float(torch.special.entr(mean / n).sum())


@torch.no_grad()
def row_entropies(targets: SoftmaxTargets) -> Tensor:
    """The entropy of every row in nats, of the shape of ``targets.z`` without its last dimension; in blocks of rows."""
    each = torch.cat([torch.special.entr(p).sum(-1) for p in targets.blocks()])
    return each.view(targets.z.shape[:-1])


@torch.no_grad()
def log_marginal(targets: SoftmaxTargets) -> Tensor:
    """``(K,)``: the log of the mean row, over this process's rows; a block of rows at a time."""
    total = torch.stack([p.sum(0) for p in targets.blocks()]).sum(0)
    return (total / targets.z.shape[:-1].numel()).clamp_min(torch.finfo(torch.float32).tiny).log()
