"""How projections lie on the sphere, whatever the prototypes."""

import numpy as np
import torch
from torch import Tensor


def entropy(counts: np.ndarray) -> float:
    """Plug-in entropy in nats of the distribution proportional to counts."""
    p = counts[counts > 0].astype(np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum()) + 0.0  # not -0


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of z (Roy & Vetterli, 2007), uncentred.

    Args:
        z: (n, D) floating, finite, not all zero.

    Returns:
        Between 1 and min(n, D).

    Raises:
        ValueError: ``z`` is not such a matrix.
    """
    z = finite(z).double()
    z = z / z.abs().max().clamp_min(1e-300)
    return effective_rank_of_gram(z.T @ z if len(z) > z.shape[1] else z @ z.T)


def effective_rank_of_gram(gram: Tensor) -> float:
    """:func:`effective_rank` of z from ``zᵀz (D, D)``, float64, which sums over batches and ranks.

    Raises:
        ValueError: all of it is zero.
    """
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        raise ValueError("z is all zero and has no rank; check that the encoder's output is alive")
    return float(np.exp(entropy(values.cpu().numpy())))


def uniformity(z: Tensor, max_points: int = 4096, seed: int = 0) -> float:
    """log of the mean of exp(-2 ||a - b||^2) over pairs of distinct rows, on the unit sphere.

    Wang & Isola (2020) with t = 2. Lower is more uniform: 0 if all rows coincide, near -4 for points spread
    over a high-dimensional sphere.

    Args:
        z: (n, D) floating, n >= 2, rows non-zero.
        max_points: above this many rows, a random subset (by seed) is used.

    Raises:
        ValueError: fewer than two rows, or a zero or non-finite row.
    """
    z = finite(z)
    if len(z) < 2:
        raise ValueError(f"uniformity compares pairs of rows, got {len(z)}; pass at least 2")
    if len(z) > max_points:
        chosen = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:max_points]
        z = z[chosen.to(z.device)]
    z = z.double()
    if not bool((z.abs().amax(1) > 0).all()):
        raise ValueError("z has a zero row, which has no direction; check that the encoder's output is alive")
    z = torch.nn.functional.normalize(z, dim=1, eps=0.0)
    total = torch.zeros((), dtype=torch.float64, device=z.device)
    for rows in z.split(512):
        total += torch.exp(4 * (rows @ z.T - 1)).sum()
    n = len(z)
    # Each row met itself once, at distance 0.
    return float(torch.log(((total - n) / (n * (n - 1))).clamp(1e-300, 1.0)))


def alignment(z_views: Tensor) -> float:
    """Mean squared distance between two views of the same image, on the unit sphere (Wang & Isola, 2020, α = 2).

    Args:
        z_views: (V, n, D) projections of V >= 2 augmented views of the same n images, rows non-zero.

    Returns:
        Between 0 (views coincide) and 4; 2 is what unrelated directions have. Low only helps together with a
        low `uniformity`: a collapsed encoder aligns perfectly.

    Raises:
        ValueError: fewer than two views, or a zero or non-finite row.
    """
    if z_views.ndim != 3 or len(z_views) < 2:
        raise ValueError(f"alignment compares views: need (V, n, D) with V >= 2, got {tuple(z_views.shape)}")
    flat = finite(z_views.flatten(0, 1)).double()
    if not bool((flat.abs().amax(1) > 0).all()):
        raise ValueError("z has a zero row, which has no direction; check that the encoder's output is alive")
    unit = torch.nn.functional.normalize(flat, dim=1, eps=0.0).view(z_views.shape)
    views = len(unit)
    # The squared length of the sum of V unit vectors is V plus twice the cosines of its pairs.
    cosines = (unit.sum(0).square().sum(-1) - views) / (views * (views - 1))
    return float((2 - 2 * cosines).mean().clamp_min(0))


def finite(z: Tensor) -> Tensor:
    if z.ndim != 2 or not z.is_floating_point() or 0 in z.shape:
        raise ValueError(f"z must be a non-empty floating (n, D) tensor, got {tuple(z.shape)} of {z.dtype}")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("z holds NaN or infinite values; look for the step where training diverged")
    return z.detach()
