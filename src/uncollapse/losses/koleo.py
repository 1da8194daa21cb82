"""KoLeo-Proto, the regulariser that pushes prototypes apart, without a K x K matrix.

The neighbour search is half a matrix product in float32 by tiles. Of every tile only the largest cosine of each row
with each group of rows is kept. A rounded product cannot tell near ties apart, so in the end every group that might
hold a row's neighbour, given the largest error of such a product, is looked at again in float64. What is found does
not depend on the block size or the matrix-product precision set for the process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.checks import above_zero
from uncollapse.losses.autograd import with_gradient
from uncollapse.losses.unit_rows import through_normalisation, unit_rows, widest
from uncollapse.numerics import NEAR, blocks, rounding, rows_at_once

_TIE = 4e-15
"""Scores this close in float64 count as equal, and the lowest index wins: exact duplicates are found as one."""
_LOOK = 256
"""Rows looked at together in float64."""
_SMALL = 1536
"""Up to here one K x K product (9 MiB) is the fastest way."""


def koleo_proto(w: Tensor, eps: float = 1e-8, block: int | None = None, neighbours: Tensor | None = None) -> Tensor:
    """KoLeo-Proto: ``-mean_k log min_{j≠k} ||w̄_k - w̄_j||`` with ``w̄`` the normalised rows.

    The Kozachenko–Leonenko estimate of the prototypes' (negative) differential entropy (Govindarajan et al., *On
    Partial Prototype Collapse in the DINO Family*, 2024). The neighbours are those of :func:`nearest_neighbours`,
    without gradient; the gradient goes through the K nearest pairs, both ends, and is formed here in the forward
    pass, in float32 or wider, with no array larger than ``w``. It cannot be differentiated a second time.

    Args:
        w: ``(K, D)`` floating point, K ≥ 2; rows need not be unit length.
        eps: floor of the distance. At an exact duplicate the value is finite and the gradient zero, since no
            direction leads apart; a zero row has no direction either and gets none. NaN in any row gives NaN. Above 0.
        block: rows of a tile of the search; speed and memory depend on it, the result does not.
        neighbours: ``(K,)`` int64, each row's other end, as :func:`nearest_neighbours` gave it earlier.

    Returns:
        Scalar, float32 (float64 for float64 ``w``), in [log 1/2, -log eps].

    Raises:
        ValueError: fewer than two rows; a row that is infinite or too long for float32 (float64 for float64 ``w``);
            ``neighbours`` of another shape, or not int64.
    """
    above_zero(eps, "eps")
    if neighbours is not None and (neighbours.shape != w.shape[:1] or neighbours.dtype != torch.long):
        raise ValueError(
            f"neighbours must be int64 of shape {tuple(w.shape[:1])}, one per row of w, got {neighbours.dtype} of "
            f"shape {tuple(neighbours.shape)}; pass what nearest_neighbours returned for this matrix"
        )
    out: Tensor = with_gradient(functools.partial(_value, eps, block), [w], [neighbours])
    return out


@torch.no_grad()
def nearest_neighbours(w: Tensor, block: int | None = None) -> Tensor:
    """Index of every row's nearest other row by cosine; ties (to 4e-15 in float64) go to the lowest index.

    About half of K² products are formed and K²/128 float32 kept. Where very many rows are near-duplicates of very many
    others, so that float32 cannot tell which is nearest, up to the whole product is formed again in float64.

    Args:
        w: ``(K, D)`` floating point, K ≥ 2; rows need not be unit length.
        block: rows of a tile; speed and memory depend on it, the result does not.

    Returns:
        ``(K,)`` int64 on the device of ``w``. A zero row has no nearest and gets the row after it; next to NaN
        anything may come out.

    Raises:
        ValueError: fewer than two rows, or a row that is infinite or too long for its float type.
    """
    with torch.autocast(w.device.type, enabled=False):
        return _search(unit_rows(w)[0], block)


def _value(
    eps: float, block: int | None, tensors: Sequence[Any], needs: Sequence[bool]
) -> tuple[tuple[Tensor], list[Tensor | None]]:
    w, neighbours = tensors
    unit, length = unit_rows(w)
    value, grad = _pairs(unit, _search(unit, block) if neighbours is None else neighbours, eps, needs[0])
    # Not in half precision: the factor that a gradient scaler comes with need not fit. Autograd narrows it afterwards.
    return (value,), [None if grad is None else through_normalisation(grad, unit, length)]


# --------------------------------------------------------------------------------------------------- the search


def _search(unit: Tensor, block: int | None) -> Tensor:
    k, device = len(unit), unit.device
    tile = block or (512 if device.type == "cpu" else 4096)  # 2 MiB to stay in cache, or what fills a GPU
    size = min(128, tile)
    tile = tile // size * size
    slack = 2 * rounding(unit.shape[1])
    nearest = _Nearest(unit, size)
    single = unit.float()
    nowhere = ~(torch.linalg.vector_norm(unit, dim=1) > 0)  # zero rows, and NaN
    if block is None and k <= _SMALL:
        cosines = torch.mm(single, single.T).fill_diagonal_(-torch.inf)
        top, index = cosines.topk(min(2, k - 1), 1)
        sure = top[:, -1] < top[:, 0] - slack
        nearest.index = torch.where(sure, index[:, 0], nearest.index)
        rest = (~(sure | nowhere)).nonzero()[:, 0]
        for at in range(0, k if len(rest) else 0, size):
            nearest.look(rest, unit[at : at + size], at, True)
        nearest.settle()
        return nearest.index
    tops = _tops(single, tile, size)
    threshold = (tops.amax(0) - slack).masked_fill_(nowhere, torch.inf)
    step = rows_at_once(k, least=1)
    for first in range(0, len(tops), step):
        group, which = torch.nonzero(tops[first : first + step] >= threshold).unbind(1)
        groups = min(step, len(tops) - first)
        counts = torch.bincount(group, minlength=groups).tolist()
        itself = torch.bincount(group[which // size == group + first], minlength=groups).tolist()
        for g, suspects in enumerate(which.split(counts)):
            at = (first + g) * size
            if len(suspects):
                nearest.look(suspects, unit[at : at + size], at, itself[g] > 0)
    nearest.settle()
    return nearest.index


def _tops(x: Tensor, tile: int, size: int) -> Tensor:
    """Largest cosine of each row with each group of ``size`` other rows: ``(groups, K)``. Every pair once."""
    k = len(x)
    tops = x.new_empty(-(-k // size), k)
    scratch = x.new_empty(2 * tile * tile)
    for i in range(0, k, tile):
        rows = slice(i, min(i + tile, k))
        for j in range(i, k, 2 * tile):
            columns = slice(j, min(j + 2 * tile, k))
            cosines = _product(x[rows], x[columns], scratch)
            inside = len(x[rows]) if i == j else 0  # of these columns the rows' side shows both triangles
            if inside:
                cosines[:, :inside].diagonal().fill_(-torch.inf)
            tops[j // size : -(-columns.stop // size), rows] = _group_max(cosines, 1, size).T
            if inside < cosines.shape[1]:
                after = slice(j + inside, columns.stop)
                tops[i // size : -(-rows.stop // size), after] = _group_max(cosines[:, inside:], 0, size)
    return tops


def _product(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    # The page faults of a fresh tile cost as much as the arithmetic.
    return torch.mm(a, b.T, out=scratch[: len(a) * len(b)].view(len(a), len(b)))


def _group_max(x: Tensor, dim: int, size: int) -> Tensor:
    """Maxima over runs of ``size`` along a dimension, the last run perhaps shorter. Far cheaper than an argmax."""
    whole = x.shape[dim] // size * size
    out = x.narrow(dim, 0, whole).unflatten(dim, (-1, size)).amax(dim + 1)
    if whole == x.shape[dim]:
        return out
    return torch.cat([out, x.narrow(dim, whole, x.shape[dim] - whole).amax(dim, keepdim=True)], dim)


class _Nearest:
    """Each row's nearest so far, by float64 distance."""

    def __init__(self, unit: Tensor, size: int) -> None:
        self.unit = unit
        self.here = torch.arange(len(unit), device=unit.device)
        self.index = (self.here + 1) % len(unit)
        wide = widest(unit)
        self.score = unit.new_full((len(unit),), -torch.inf, dtype=wide)
        self._left = unit.new_empty(_LOOK, unit.shape[1], dtype=wide)
        self._right = unit.new_empty(size, unit.shape[1], dtype=wide)
        self._product = unit.new_empty(_LOOK * size, dtype=wide)
        self._open: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def look(self, which: Tensor, rows: Tensor, start: int, itself: bool) -> None:
        """Compares the rows ``which`` with ``rows``, the first of which has the index ``start``.

        ``itself``: whether some of the one may be among the other.
        """
        right = self._right[: len(rows)].copy_(rows)
        # cos - |b|²/2 falls with the distance, for rows whose length is 1 only as far as float32 goes.
        half = right.square().sum(1).div_(-2)
        half.masked_fill_(half == 0, -0.5)  # a zero row has cosine 0 with everything; it is not half as far away
        for part in which.split(_LOOK):
            left = self._left[: len(part)].copy_(self.unit[part])
            score = self._product[: len(part) * len(rows)].view(len(part), len(rows))
            torch.addmm(half, left, right.T, out=score)
            if itself:
                score.masked_fill_((part - start).unsqueeze(1) == self.here[: len(rows)], -torch.inf)
            top = score.amax(1)
            at = (score >= top.unsqueeze(1) - _TIE).byte().argmax(1)  # the first of those that tie
            self._open.append((part, top, at + start))
            self._count += len(part)
        if self._count > 4 * len(self.unit):
            self.settle()

    def settle(self) -> None:
        """Chooses among what was looked at since the last time, and what was the nearest then."""
        which, top, at = (torch.cat(x) for x in zip((self.here, self.score, self.index), *self._open, strict=True))
        self.score.scatter_reduce_(0, which, top, "amax")
        rival = top >= self.score[which] - _TIE
        self.index.scatter_reduce_(0, which[rival], at[rival], "amin", include_self=False)
        self._open, self._count = [], 0


# ---------------------------------------------------------------------------------------------------- the pairs


def _pairs(unit: Tensor, neighbours: Tensor, eps: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The value, and its gradient at the unit rows."""
    k, dim = unit.shape
    grad = torch.zeros_like(unit) if with_grad else None
    total = unit.new_zeros((), dtype=widest(unit))
    for rows in blocks(k, rows_at_once(dim, NEAR, 1)):
        other = neighbours[rows]
        apart = unit.index_select(0, other).neg_().add_(unit[rows])
        squared = torch.linalg.vector_norm(apart, dim=1).square_().add_(eps**2)
        total -= 0.5 * squared.log().sum(dtype=total.dtype)
        if grad is not None:
            apart.div_((-k * squared).unsqueeze(1))
            grad[rows].add_(apart)
            grad.index_add_(0, other, apart, alpha=-1)
    return (total / k).to(unit.dtype), grad
