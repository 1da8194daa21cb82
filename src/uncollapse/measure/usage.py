"""What describes prototypes on held-out images: which are used, how many differ among those, how evenly.

Each of these can be had without learning anything: fixed random prototypes are all unique, and an untrained encoder
with its own projections as prototypes uses all of them evenly. What prototypes are worth is `view_information`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uncollapse.measure.geometry import effective_rank, entropy, uniformity
from uncollapse.measure.information import ViewInformation, view_information
from uncollapse.measure.unique import EPSILONS, cosine_argmax, greedy_cover, nearest_kept, unique_prototypes


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
        ValueError: an index is outside [0, K), or no integer.
    """
    argmax = argmax.reshape(-1)
    if argmax.is_floating_point():
        raise ValueError(f"argmax is of {argmax.dtype}; pass indices, such as prototype_argmax or z.argmax(-1) gives")
    if len(argmax) and (int(argmax.min()) < 0 or int(argmax.max()) >= prototypes):
        raise ValueError(
            f"argmax runs from {int(argmax.min())} to {int(argmax.max())}, outside [0, {prototypes}); "
            "pass the number of rows of the prototypes it was taken over"
        )
    return torch.bincount(argmax, minlength=prototypes)


def used_prototypes(counts: Tensor) -> int:
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
    return float(np.exp(entropy(together.cpu().numpy())))


def _check_counts(counts: Tensor, w: Tensor) -> None:
    if counts.shape != (len(w),):
        raise ValueError(f"counts has shape {tuple(counts.shape)}; expected one per prototype, ({len(w)},)")


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
        used=used_prototypes(counts),
        unique_used={eps: unique_among_used(w, counts, eps) for eps in epsilons},
        effective={eps: _effective(counts, nearest_kept(w, kept[eps])) for eps in epsilons},
        view_information=None if z_views is None else view_information(z_views, w, z_fit),
        effective_rank=effective_rank(z),
        uniformity=uniformity(z) if len(z) > 1 else None,
    )
