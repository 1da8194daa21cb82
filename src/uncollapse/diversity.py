"""Regularisers that push prototypes apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_neighbours(w: Tensor, block: int = 1024) -> Tensor:
    """Index of every row's nearest other row by cosine, ``(K, D)`` unit rows → ``(K,)`` int64.

    Compares tiles of rows and uses that the similarity is symmetric, so about half of K² products are
    formed and never more than two tiles are held.
    """
    k = w.shape[0]
    best = w.new_full((k,), -torch.inf)
    index = torch.zeros(k, dtype=torch.long, device=w.device)
    for i in range(0, k, block):
        rows = slice(i, min(i + block, k))
        for j in range(i, k, block):
            columns = slice(j, min(j + block, k))
            cosines = w[rows] @ w[columns].T
            if i == j:
                cosines.fill_diagonal_(-torch.inf)
            _keep_better(best, index, rows, *cosines.max(1), offset=j)
            if i != j:
                _keep_better(best, index, columns, *cosines.max(0), offset=i)
    return index


def _keep_better(best: Tensor, index: Tensor, where: slice, value: Tensor, at: Tensor, offset: int) -> None:
    better = value > best[where]
    best[where] = torch.where(better, value, best[where])
    index[where] = torch.where(better, at + offset, index[where])


def koleo_proto(w: Tensor, eps: float = 1e-8, block: int = 1024) -> Tensor:
    """KoLeo-Proto: ``-mean_k log min_{j≠k} ||w̄_k - w̄_j||`` with ``w̄`` the normalised rows.

    The Kozachenko–Leonenko estimate of the prototypes' (negative) differential entropy (Govindarajan et
    al., *On Partial Prototype Collapse in the DINO Family*, 2024). The neighbour search is blocked and has
    no gradient; the gradient goes through the K nearest pairs, both ends, in float32 or wider.

    Args:
        w: ``(K, D)`` floating point, K ≥ 2; rows need not be unit length.
        eps: floor of the distance. At an exact duplicate the value is finite and the gradient zero, since
            no direction leads apart.

    Raises:
        ValueError: fewer than two rows.
    """
    if w.ndim != 2 or w.shape[0] < 2:
        raise ValueError(f"koleo_proto needs a (K, D) matrix with K ≥ 2, got shape {tuple(w.shape)}")
    with torch.autocast(w.device.type, enabled=False):
        unit = F.normalize(w if w.dtype == torch.float64 else w.float(), dim=-1)
        with torch.no_grad():
            neighbours = nearest_neighbours(unit, block)
        squared = (unit - unit[neighbours]).square().sum(-1)
        return -0.5 * (squared + eps**2).log().mean()
