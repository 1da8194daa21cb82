"""Projections seen from their running mean, in units of their spread: what a mixture can be fitted to instead."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Whitening = Literal["none", "centred", "whitened"]

_KEPT = 0.99
"""Of the running moments, per step."""
_FLOOR = 1e-3
"""Least variance along an axis, relative to the largest."""


class Frame(nn.Module):
    """The map ``x = A (z - μ)`` with a mean squared length of about 1, from running moments of the rows.

    Args:
        dim: D.
        kind: ``centred``: A is one number; ``whitened``: A makes the covariance a multiple of the identity.
    """

    middle: Tensor
    second: Tensor
    turn: Tensor

    def __init__(self, dim: int, kind: Whitening) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("middle", torch.zeros(dim))
        self.register_buffer("second", torch.eye(dim) / dim)
        self.register_buffer("turn", torch.eye(dim))

    def forward(self, z: Tensor) -> Tensor:
        return (z - self.middle) @ self.turn.T

    def back(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``weight (K, D)`` over x as weight and bias ``(K,)`` over z: the same products."""
        over_z = weight @ self.turn
        return over_z, -(over_z @ self.middle)

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Moves the moments by rows ``(n, D)``, n ≥ 1."""
        z = z.to(self.middle)
        self.middle.lerp_(z.mean(0), 1 - _KEPT)
        apart = z - self.middle
        self.second.lerp_(apart.T @ apart / len(z), 1 - _KEPT)
        dim = len(self.middle)
        if self.kind == "centred":
            self.turn.copy_(torch.eye(dim).to(self.turn) / self.second.trace().clamp_min(1e-8).sqrt())
            return
        values, vectors = torch.linalg.eigh(self.second)
        values = values.clamp_min(_FLOOR * float(values[-1]))
        self.turn.copy_(vectors @ (vectors / values.sqrt()).T / dim**0.5)
