"""Features of Gaussian classes, on which the best classifier is known."""

from __future__ import annotations

import torch
from torch import Tensor


def task(n: int, dim: int, classes: int, spread: float, seed: int, gap: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features ``(n, dim)`` and labels ``(n,)``; centres are the same for every seed, and ``gap`` scales them."""
    rng = torch.Generator().manual_seed(seed)
    centres = gap * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=rng)
    return centres[y] + spread * torch.randn(n, dim, generator=rng), y
