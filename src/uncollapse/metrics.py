"""What describes prototypes on held-out images: which are used, how many differ among those, how evenly.

Each of these can be had without learning anything: fixed random prototypes are all unique, and an untrained encoder
with its own projections as prototypes uses all of them evenly. What prototypes are worth is `view_information`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uncollapse.information import ViewInformation, view_information
from uncollapse.unique import EPSILONS, cosine_argmax, greedy_cover, nearest_kept, unique_prototypes


def prototype_argmax(z: Tensor, w: Tensor, block: int | None = None) -> Tensor:
    """The prototype of each projection: argmax of the raw cosine, ties to the lowest index.

    Args:
        z: (n, D) projections of held-out images, floating, any norm but zero.
        w: (K, D) prototypes, floating, any norm but zero, on the same device.
        block: projections handled at a time; affects memory (block x K), never the result.

    Returns:
        (n,) int64 in [0, K).

    Raises:
        ValueError: shapes disagree, or a row of either is zero or non-finite.
    """
    return cosine_argmax(z, w, block)


def usage_counts(argmax: Tensor, prototypes: int) -> Tensor:
    """How many images chose each prototype: (n,) int64 in [0, K) -> (K,) int64, summing to n.

    Raises:
        ValueError: an index is outside [0, K).
    """
    argmax = argmax.reshape(-1)
    if len(argmax) and (int(argmax.min()) < 0 or int(argmax.max()) >= prototypes):
        raise ValueError(
            f"argmax runs from {int(argmax.min())} to {int(argmax.max())}, outside [0, {prototypes}); "
            "pass the number of rows of the prototypes it was taken over"
        )
    return torch.bincount(argmax, minlength=prototypes)


def used(counts: Tensor) -> int:
    """Number of prototypes chosen at least once: (K,) counts -> int in [0, K]. Print n beside it."""
    return int((counts > 0).sum())


def unique_among_used(w: Tensor, counts: Tensor, eps: float = 0.025) -> int:
    """Unique prototypes (`greedy_cover`) when only the used ones are looked at; 0 if none is used.

    Args:
        w: (K, D) prototypes. counts: (K,) usage counts. eps: cosine distance in (0, 2].

    Raises:
        ValueError: as `greedy_cover`, or ``counts`` does not have one entry per prototype.
    """
    _check_counts(counts, w)
    chosen = w[(counts > 0).to(w.device)]
    return unique_prototypes(chosen, eps) if len(chosen) else 0


def effective_prototypes(counts: Tensor, w: Tensor, eps: float = 0.025) -> float:
    """N_eff(eps): as how many equally used, distinct prototypes these count; not yet that this means anything.

    The exponential of the entropy of the usage counts after every prototype's count is added to its nearest
    kept one, kept being the greedy cover of all prototypes at eps.

    Args:
        counts: (K,) usage counts. w: (K, D) prototypes. eps: cosine distance in (0, 2].

    Returns:
        Between 1 and the number of used prototypes.

    Raises:
        ValueError: as `greedy_cover`; counts do not fit ``w``, are negative or all zero.
    """
    _check_counts(counts, w)
    return _effective(counts, nearest_kept(w, greedy_cover(w, eps)))


def _effective(counts: Tensor, nearest: Tensor) -> float:
    if int(counts.sum()) == 0 or int(counts.min()) < 0:
        raise ValueError("counts must be non-negative and not all zero; count at least one image")
    together = torch.zeros_like(counts).index_add_(0, nearest.to(counts.device), counts)
    return float(np.exp(_entropy(together.cpu().numpy())))


def _check_counts(counts: Tensor, w: Tensor) -> None:
    if counts.shape != (len(w),):
        raise ValueError(f"counts has shape {tuple(counts.shape)}; expected one per prototype, ({len(w)},)")


def _entropy(counts: np.ndarray) -> float:
    """Plug-in entropy in nats of the distribution proportional to counts."""
    p = counts[counts > 0].astype(np.float64)
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of z (Roy & Vetterli, 2007), uncentred.

    Args:
        z: (n, D) floating, finite, not all zero.

    Returns:
        Between 1 and min(n, D).

    Raises:
        ValueError: ``z`` is not such a matrix.
    """
    z = _finite(z).double()
    z = z / z.abs().max().clamp_min(1e-300)
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if float(values.sum()) == 0:
        raise ValueError("z is all zero and has no rank; check that the encoder's output is alive")
    return float(np.exp(_entropy(values.cpu().numpy())))


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
    z = _finite(z)
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
    flat = _finite(z_views.flatten(0, 1)).double()
    if not bool((flat.abs().amax(1) > 0).all()):
        raise ValueError("z has a zero row, which has no direction; check that the encoder's output is alive")
    unit = torch.nn.functional.normalize(flat, dim=1, eps=0.0).view(z_views.shape)
    views = len(unit)
    # The squared length of the sum of V unit vectors is V plus twice the cosines of its pairs.
    cosines = (unit.sum(0).square().sum(-1) - views) / (views * (views - 1))
    return float((2 - 2 * cosines).mean().clamp_min(0))


def _finite(z: Tensor) -> Tensor:
    if z.ndim != 2 or not z.is_floating_point() or 0 in z.shape:
        raise ValueError(f"z must be a non-empty floating (n, D) tensor, got {tuple(z.shape)} of {z.dtype}")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("z holds NaN or infinite values; look for the step where training diverged")
    return z.detach()


@dataclass(frozen=True)
class PrototypeReport:
    """What K prototypes carry, seen through the projections of n held-out images.

    Dicts go from eps (cosine distance) to the number; see the functions of the same names.
    """

    prototypes: int
    n: int
    unique: dict[float, int]
    used: int
    unique_used: dict[float, int]
    effective: dict[float, float]
    view_information: ViewInformation | None
    """The figure of merit; None without views."""
    effective_rank: float
    uniformity: float | None
    """Of the projections, like `effective_rank`; None for a single image."""


def prototype_report(
    w: Tensor,
    z: Tensor,
    z_views: Tensor | None = None,
    z_fit: Tensor | None = None,
    epsilons: Sequence[float] = EPSILONS,
) -> PrototypeReport:
    """All of the above and `view_information` at once.

    Args:
        w: (K, D) prototypes, floating.
        z: (n, D) projections of held-out images, one view each, on the device of ``w``.
        z_views: (V, n, D) projections of V >= 2 augmented views of the same images, for `view_information`.
        z_fit: (V', m, D) of other images, as `view_information` takes them.
        epsilons: cosine distances, at least one.

    Raises:
        ValueError: no epsilons, shapes disagree, or a row is zero or non-finite.
    """
    if not epsilons:
        raise ValueError("epsilons is empty; pass at least one cosine distance, such as 0.025")
    if z_views is not None and (z_views.ndim != 3 or z_views.shape[1:] != z.shape):
        raise ValueError(
            f"z_views has shape {tuple(z_views.shape)}; expected (V, {', '.join(map(str, z.shape))}), "
            "views of the same images in the same order"
        )
    counts = usage_counts(prototype_argmax(z, w), len(w))
    kept = {eps: greedy_cover(w, eps) for eps in epsilons}
    return PrototypeReport(
        prototypes=len(w),
        n=len(z),
        unique={eps: len(kept[eps]) for eps in epsilons},
        used=used(counts),
        unique_used={eps: unique_among_used(w, counts, eps) for eps in epsilons},
        effective={eps: _effective(counts, nearest_kept(w, kept[eps])) for eps in epsilons},
        view_information=None if z_views is None else view_information(z_views, w, z_fit),
        effective_rank=effective_rank(z),
        uniformity=uniformity(z) if len(z) > 1 else None,
    )
