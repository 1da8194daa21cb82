"""Which share of the images each prototype should get, where that is not the same for all."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.checks import has_shape


def power_law(count: int, exponent: float, like: Tensor | None = None) -> Tensor:
    """``p_k ∝ k^(-exponent)``, k from 1: the prior of PMSN (Assran et al., *The Hidden Uniform Cluster Prior*, 2023).

    Args:
        count: K, at least 1.
        exponent: 0 or above; 0 is uniform, the paper's is 0.25.
        like: the result has its dtype and device; float32 on the CPU without it.

    Returns:
        ``(K,)``, positive, falling, sums to 1.

    Raises:
        ValueError: no prototypes, or an exponent below 0.
    """
    if count < 1 or not 0 <= exponent < float("inf"):
        raise ValueError(f"a power law needs prototypes and an exponent of 0 or above, got {count} and {exponent}")
    device = None if like is None else like.device
    k = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    return torch.softmax(-exponent * k.log(), 0).to(torch.float32 if like is None else like.dtype)


def log_shares(shares: Tensor | None, count: int, like: Tensor) -> Tensor:
    """``(K,)``: the log of shares, up to a constant; of equal ones, where there are none, 0.

    Raises:
        ValueError: not K of them, or one that is not above 0.
    """
    if shares is None:
        return like.new_zeros(())
    has_shape(shares, (count,), "marginal")
    if shares.device.type == "cpu" and not bool((shares > 0).all()):
        raise ValueError("a marginal must be above 0 for every prototype; rule one out with a bias of -inf instead")
    return shares.detach().to(like).log()
