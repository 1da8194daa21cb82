"""Regularisers that keep vectors apart, on prototypes or on features: the rivals of KoLeo-Proto.

Each takes a matrix ``(K, D)`` whose rows need not be unit length, puts them on the unit sphere, and gives a scalar that
falls as they spread. None stores a K × K array; where one is passed through tile by tile, the gradient is formed in the
same pass, in the forward pass. Gradients are in float32 or wider, leave the rows' lengths alone (a zero row gets none),
and cannot be differentiated a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.checks import above_zero
from uncollapse.losses.autograd import with_gradient
from uncollapse.losses.koleo import koleo_proto
from uncollapse.losses.unit_rows import through_normalisation, unit_rows, widest
from uncollapse.neighbours.spanning_tree import spanning_tree
from uncollapse.numerics import NEAR, rows_at_once

Form = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and squared distances of a tile of pairs → the pairs' values, and their slopes by the cosine."""

_NEAR = 1e-2
"""Squared distances below this are taken from differences: a float32 cosine does not have them."""


def spread(kind: str, w: Tensor, pairs: Tensor | None = None) -> Tensor:
    """A regulariser of prototypes by the name that recipes give it, with its own defaults.

    Args:
        kind: ``koleo``, ``repulsion``, ``energy``, ``orthogonality`` or ``mst``.
        w: ``(K, D)``.
        pairs: neighbours or tree found earlier, for ``koleo`` and ``mst``.

    Raises:
        ValueError: no such name, or what the regulariser refuses.
    """
    if kind == "koleo":
        return koleo_proto(w, neighbours=pairs)
    if kind == "mst":
        return mst_length(w, tree=pairs)
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "repulsion": repulsion,
        "energy": hyperspherical_energy,
        "orthogonality": orthogonality,
    }
    if kind not in others:
        raise ValueError(f"no regulariser {kind!r}; there are koleo, mst, {', '.join(others)}")
    return others[kind](w)


def koleo_features(features: Tensor, images: int | None = None) -> Tensor:
    """KoLeo on the features of a batch (Sablayrolles et al. 2019, Section 3), as DINOv2 has it (Oquab et al. 2024).

    ``-mean_i log min_{j≠i} ||f̄_i - f̄_j||`` with ``f̄`` the normalised features; `koleo_proto` on rows that are
    images. The gradient goes through both ends of every pair.

    Args:
        features: ``(n, d)`` floating, n ≥ 2, one row per image: views of one image must not be among them.
        images: features are compared within so many rows that follow one another, such as those of one GPU in the
            released code; None: all with all. The mean is over all rows; a last row on its own counts 0.

    Returns:
        Scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: fewer than two rows, or a row that is infinite.
    """
    n = len(features)
    groups = [group for group in features.split(images or max(1, n)) if len(group) > 1 or n == 1]
    return torch.stack([koleo_proto(group) * (len(group) / n) for group in groups]).sum()


def repulsion(w: Tensor, t: float = 2.0, block: int | None = None) -> Tensor:
    """Pairwise repulsion by a Gaussian potential: the uniformity of Wang & Isola (ICML 2020, eq. 2).

    ``log mean_{i≠j} exp(-t ||w̄_i - w̄_j||²)``. The mean is dominated by the closest pairs the more, the larger t is.

    Args:
        w: ``(K, D)`` floating, K ≥ 2.
        t: above 0; 2 in the paper. From about 20 on the potential of distant pairs is 0 in float32.
        block: rows of a tile; speed and memory depend on it, the result up to rounding not.

    Returns:
        Scalar, float32 (float64 for float64 ``w``), in [-4t, 0]; 0 where all rows coincide.

    Raises:
        ValueError: fewer than two rows, an infinite row, or a t that is not above 0.
    """
    above_zero(t, "t")

    def potential(cosines: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.exp(-t * squared)
        return value, value

    def form(tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[tuple[Tensor], list[Tensor | None]]:
        unit, length = unit_rows(tensors[0])
        total, grad = _over_pairs(unit, potential, block, needs[0])
        pairs = len(unit) * (len(unit) - 1)
        if grad is not None:
            grad = through_normalisation(grad.mul_(4 * t / total.to(grad.dtype)), unit, length)
        return ((total / pairs).log().to(unit.dtype),), [grad]

    out: Tensor = with_gradient(form, [w])
    return out


def hyperspherical_energy(w: Tensor, s: float = 1.0, eps: float = 1e-3, block: int | None = None) -> Tensor:
    """Mean Riesz s-energy of the rows on the sphere (Liu et al., NeurIPS 2018, eq. 1, here divided by K(K - 1)).

    ``mean_{i≠j} ||w̄_i - w̄_j||^{-s}``; for s = 0 the logarithmic energy ``mean_{i≠j} -log ||w̄_i - w̄_j||``.

    Args:
        w: ``(K, D)`` floating, K ≥ 2.
        s: 0 or above; 0, 1 and 2 in the paper.
        eps: smallest distance that counts (added in squares), above 0: pairs closer than this hardly repel one another,
            and exact duplicates not at all, since no direction leads apart.
        block: rows of a tile; speed and memory depend on it, the result up to rounding not.

    Returns:
        Scalar, float32 (float64 for float64 ``w``), at most ``eps ** -s``.

    Raises:
        ValueError: fewer than two rows, an infinite row, a negative s, or an eps that is not above 0.
    """
    above_zero(eps, "eps")
    if not s >= 0:
        raise ValueError(f"s must be 0 or above, got {s}")

    def energy(cosines: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
        floored = squared + eps**2
        value = -0.5 * floored.log() if s == 0 else floored ** (-s / 2)
        return value, floored.reciprocal() if s == 0 else s * value / floored

    def form(tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[tuple[Tensor], list[Tensor | None]]:
        unit, length = unit_rows(tensors[0])
        total, grad = _over_pairs(unit, energy, block, needs[0])
        pairs = len(unit) * (len(unit) - 1)
        if grad is not None:
            grad = through_normalisation(grad.mul_(2 / pairs), unit, length)
        return ((total / pairs).to(unit.dtype),), [grad]

    out: Tensor = with_gradient(form, [w])
    return out


def orthogonality(w: Tensor) -> Tensor:
    """Mean squared cosine of two rows: soft orthogonality, ``||W̄ W̄ᵀ - I||²_F / (K (K - 1))``.

    The off-diagonal penalty of Brock et al. (ICLR 2019, eq. 3) and soft orthogonality of Bansal et al. (NeurIPS 2018),
    on unit rows, where they are the same. Its sum over pairs is that of the D × D matrix ``W̄ᵀ W̄``, which is what is
    formed where K > D. No more than D rows can be orthogonal: beyond that the least possible value is
    ``(K - D) / (D (K - 1))`` (Welch 1974), and D orthogonal directions with K/D copies of each reach it as well as K
    distinct ones, so that it does not tell duplicates.

    Args:
        w: ``(K, D)`` floating, K ≥ 2.

    Returns:
        Scalar, float32 (float64 for float64 ``w``), in [0, 1].

    Raises:
        ValueError: fewer than two rows, or an infinite row.
    """
    out: Tensor = with_gradient(_orthogonality, [w])
    return out


def _orthogonality(tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[tuple[Tensor], list[Tensor | None]]:
    unit, length = unit_rows(tensors[0])
    k, dim = unit.shape
    pairs = k * (k - 1)
    if k > dim:
        gram = unit.T @ unit
        own = torch.linalg.vecdot(unit, unit).square().sum(dtype=widest(unit))  # each row with itself
        total = gram.square().sum(dtype=own.dtype) - own
    else:
        gram = (unit @ unit.T).fill_diagonal_(0)
        total = gram.square().sum(dtype=widest(unit))
    grad = None
    if needs[0]:
        grad = unit @ gram if k > dim else gram @ unit
        grad = through_normalisation(grad.mul_(4 / pairs), unit, length)
    return ((total / pairs).clamp_min(0).to(unit.dtype),), [grad]


def mst_length(w: Tensor, eps: float = 1e-8, tree: Tensor | None = None) -> Tensor:
    """T-REG: minus the length of the minimum spanning tree of the rows on the sphere (Mordacq et al., NeurIPS 2025).

    ``-(1/K) Σ_{(i,j) in tree} ||w̄_i - w̄_j||``. Euclidean lengths as in the paper; that rows are put on the sphere takes
    the place of its second term, which draws them there. The division by K is ours: it makes the weight mean the same
    at any K. The gradient goes through the K - 1 edges, both ends; the tree itself is constant.

    Args:
        w: ``(K, D)`` floating, K ≥ 2.
        eps: smallest length that counts (added in squares); the gradient of an edge of length 0 is 0. Above 0.
        tree: ``(2, K - 1)`` int64, as `spanning_pairs` gave it earlier.

    Returns:
        Scalar, float32 (float64 for float64 ``w``), in (-2, 0].

    Raises:
        ValueError: fewer than two rows, a zero, infinite or NaN row (where the tree is looked for), an eps that is not
            above 0, or a tree of another shape.
    """
    above_zero(eps, "eps")
    if tree is not None and (tree.shape != (2, len(w) - 1) or tree.dtype != torch.long):
        raise ValueError(
            f"tree must be int64 of shape {(2, len(w) - 1)}, got {tree.dtype} of shape {tuple(tree.shape)}; pass what "
            "spanning_pairs returned for this matrix"
        )
    out: Tensor = with_gradient(functools.partial(_tree_length, eps), [w], [tree])
    return out


@torch.no_grad()
def spanning_pairs(w: Tensor) -> Tensor:
    """``(2, K - 1)`` int64: the edges of the minimum spanning tree of the rows by direction, on the device of ``w``.

    Up to the rounding of float32 cosines: an edge may stand for one that is shorter by less than that.

    Raises:
        ValueError: ``w`` is no floating matrix, or has a zero or non-finite row.
    """
    return torch.from_numpy(spanning_tree(w).edges).to(w.device)


def _tree_length(
    eps: float, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    w, tree = tensors
    unit, length = unit_rows(w)
    left, right = spanning_pairs(w) if tree is None else tree
    grad = torch.zeros_like(unit) if needs[0] else None
    total = unit.new_zeros((), dtype=widest(unit))
    for a, b in zip(left.split(step := rows_at_once(unit.shape[1], NEAR, 1)), right.split(step), strict=True):
        apart = unit[a] - unit[b]
        distance = (torch.linalg.vector_norm(apart, dim=1).square() + eps**2).sqrt()
        total -= distance.sum(dtype=total.dtype)
        if grad is not None:
            apart.div_((-len(w) * distance).unsqueeze(1))
            grad.index_add_(0, a, apart)
            grad.index_add_(0, b, apart, alpha=-1)
    grad = None if grad is None else through_normalisation(grad, unit, length)
    return ((total / len(w)).to(unit.dtype),), [grad]


def _over_pairs(unit: Tensor, form: Form, block: int | None, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over ordered pairs i ≠ j of the values of ``form``, and for each i of its slopes times row j."""
    k = len(unit)
    tile = block or (512 if unit.device.type == "cpu" else 4096)
    total = unit.new_zeros((), dtype=widest(unit))
    grad = torch.zeros_like(unit) if with_grad else None
    for i in range(0, k, tile):
        rows = unit[i : i + tile]
        for j in range(i, k, tile):
            columns = unit[j : j + tile]
            cosines = rows @ columns.T
            values, slopes = form(cosines, _squared(cosines, rows, columns))
            if i == j:
                values, slopes = values.fill_diagonal_(0), slopes.fill_diagonal_(0)
            total += values.sum(dtype=total.dtype) * (1 if i == j else 2)
            if grad is not None:
                grad[i : i + tile].addmm_(slopes, columns)
                if i != j:
                    grad[j : j + tile].addmm_(slopes.T, rows)
    return total, grad


def _squared(cosines: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of unit rows; those of near ones by difference."""
    squared = (2 - 2 * cosines).clamp_min_(0)
    left, right = (squared < _NEAR).nonzero().unbind(1)
    for a, b in zip(left.split(NEAR), right.split(NEAR), strict=True):
        squared[a, b] = (rows[a] - columns[b]).square().sum(1)
    return squared
