"""Rows put on the unit sphere, and the gradient's way back: what the regularisers that keep rows apart share."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.numerics import NEAR, blocks, rows_at_once

SMALLEST = 1e-12
"""Rows shorter than this are zero rows to every normalisation in torch, and here."""


def _wide(w: Tensor) -> Tensor:
    return w if w.dtype == torch.float64 else w.float()


def widest(w: Tensor) -> torch.dtype:
    return torch.float32 if w.device.type == "mps" else torch.float64  # mps has no float64


def unit_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows in float32 or wider, and their lengths ``(K, 1)``.

    Raises:
        ValueError: fewer than two rows, or one that is infinite or too long for its float type.
    """
    if w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"vectors must be a floating (K, D) matrix, got {w.dtype} of shape {tuple(w.shape)}")
    if len(w) < 2:
        raise ValueError(f"vectors are kept apart from one another: it takes K ≥ 2 rows, got shape {tuple(w.shape)}")
    wide = _wide(w.detach())
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if endless := length[:, 0].isinf().nonzero()[:, 0].tolist():
        raise ValueError(
            f"row {endless[0]} of w ({len(endless)} in all) is infinite or too long to be normalised in "
            f"{length.dtype}; prototypes that grow like this have diverged: lower their learning rate, or normalise "
            "them after each step"
        )
    return wide / length.clamp_min(SMALLEST), length


def through_normalisation(grad: Tensor, unit: Tensor, length: Tensor) -> Tensor:
    """Turns, in place, the gradient at the unit rows into the gradient at rows of that length."""
    for rows in blocks(len(grad), rows_at_once(unit.shape[1], NEAR, 1)):
        g, u, r = grad[rows], unit[rows], length[rows]
        # A zero row has no direction; it takes no part.
        scale = torch.where(r < SMALLEST, 0, r.reciprocal())
        g.addcmul_(u, torch.linalg.vecdot(g, u).unsqueeze(1), value=-1).mul_(scale)
    return grad
