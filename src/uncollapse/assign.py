"""How the teacher's target is made from its logits: centering, Sinkhorn."""

from __future__ import annotations

import torch
from torch import Tensor


def centred_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """DINO's target: ``softmax((logits - center) / temperature)``, rows summing to 1.

    Args:
        logits: ``(n, K)`` float32, teacher's, not divided by a temperature.
        center: ``(K,)``, running mean of such logits; subtracted before the division, as DINO does.
        temperature: above 0.
    """
    return torch.softmax((logits - center) / temperature, dim=-1)


def sinkhorn(log_scores: Tensor, iterations: int = 3) -> Tensor:
    """Balanced assignment of rows to columns by Sinkhorn–Knopp in log space (Cuturi 2013; Caron et al. 2020).

    Args:
        log_scores: ``(n, K)`` float32, already divided by the temperature.
        iterations: each scales columns to equal mass, then rows to 1.

    Returns:
        ``(n, K)``: rows sum to 1; every column's mass tends to ``n / K``.
    """
    log_p = log_scores
    for _ in range(iterations):
        log_p = log_p - log_p.logsumexp(dim=0, keepdim=True)
        log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
    return log_p.exp()
