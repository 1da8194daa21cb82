"""How many prototypes are different from one another, counted exactly and without a K x K matrix.

Distance is cosine distance, ``1 - cos``. Two countings are in use and they can differ a lot on the same
matrix: the greedy cover of the prototype-collapse papers (`greedy_cover`, order-dependent) and the connected
components of the graph of close pairs (`components`, chains merge; never more than the greedy count).

Every decision is the one float64 arithmetic takes. The bulk of the work is done in float32, whose rounding is
bounded, and only pairs closer to the threshold than that bound are looked at again in float64, so results do
not depend on the block size, on the device, or on the matrix-product precision set for the process.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from uncollapse.neighbours.close_pairs import TILE, Rows, band
from uncollapse.numerics import rows_at_once

EPSILONS = (0.025, 0.1, 0.25, 0.5)
SWEEP = tuple(float(eps) for eps in np.round(np.linspace(0.0125, 0.5, 40), 4))
"""ε at which unique prototypes are drawn as a curve."""

_SMALL = 2048  # up to here one K x K product (16 MB) is the fastest way
_BLOCK = 1024  # rows of a tile
_FEW_ROWS, _FEW_EACH = 128, 2  # suspects of a block, and candidates of each, up to which these are compared singly


def greedy_cover(
    w: Tensor, eps: float, block: int | None = None, progress: Callable[[float], None] = lambda share: None
) -> Tensor:
    """Indices of the unique prototypes: a prototype is kept unless it lies within eps of one kept before it.

    Scans in index order, as the papers on partial prototype collapse do; the kept rows are pairwise at least
    eps apart and every row lies within eps of a kept one. The count depends on the order of the rows and need
    not fall monotonically with eps.

    Args:
        w: (K, D) prototypes of any floating dtype, on any device; rows need not be normalised.
        eps: cosine distance in (0, 2]; row k is redundant iff ``1 - cos < eps`` for some kept row.
        block: rows handled at a time; affects speed and memory, never the result.
        progress: told the share of the work that is done, supposing that the rest has as many duplicates.

    Returns:
        (M,) int64, ascending, on the device of ``w``.

    Raises:
        ValueError: ``w`` is not a (K, D) floating tensor or has a zero or non-finite row; eps or block is out
            of range.
    """
    return _cover(Rows(w), eps, block, progress).to(w.device)


def unique_prototypes(w: Tensor, eps: float = 0.025) -> int:
    """Number of unique prototypes: the length of `greedy_cover`, which see. Between 1 and K."""
    return len(greedy_cover(w, eps))


def epsilon_sweep(w: Tensor, epsilons: Sequence[float] = EPSILONS) -> dict[float, int]:
    """`unique_prototypes` at several eps, sharing what can be shared. A few ms at K = 1024.

    Returns a dict from each eps, in the order given, to its count. Raises as `greedy_cover`.
    """
    rows = Rows(w)
    if len(rows) > _SMALL:
        return {eps: len(_cover(rows, eps, None)) for eps in epsilons}
    everything = torch.arange(len(rows))
    cos = rows.cosines(everything, everything)
    return {eps: int(_resolve(rows.near(cos, everything, everything, eps)).sum()) for eps in epsilons}


def nearest_kept(w: Tensor, kept: Tensor) -> Tensor:
    """For every prototype, the index of the nearest kept one by cosine; a kept one maps to itself.

    Args:
        w: (K, D) prototypes, floating.
        kept: (M,) distinct indices into ``w``, M >= 1, as `greedy_cover` returns them.

    Returns:
        (K,) int64 indices into ``w`` (not into ``kept``). Ties go to the one listed first in ``kept``.

    Raises:
        ValueError: as `greedy_cover`, or ``kept`` is empty or points outside ``w``.
    """
    kept = kept.to(w.device)
    if kept.ndim != 1 or not len(kept) or int(kept.min()) < 0 or int(kept.max()) >= len(w):
        raise ValueError(f"kept must list at least one index in [0, {len(w)}); pass what greedy_cover returned")
    nearest = torch.arange(len(w), device=w.device)
    others = torch.ones(len(w), dtype=torch.bool, device=w.device)
    others[kept] = False
    if bool(others.any()):
        nearest[others] = kept[cosine_argmax(w[others], w[kept])]
    return nearest


def components(w: Tensor, eps: float) -> int:
    """Number of connected components of the graph whose edges join prototypes with ``1 - cos < eps``.

    Does not depend on the order of the rows; chains of neighbours merge, so it is never more than the greedy
    count. Arguments and errors as `greedy_cover`. Compares all pairs: about half a K x K product.
    """
    rows = Rows(w)
    labels = np.arange(len(rows), dtype=np.int32)
    for i, j, near in _near_tiles(rows, eps):
        # One edge per row and column and round: a collapsed matrix has billions, and few rounds are needed.
        while (across := near & (labels[i][:, None] != labels[j])).any():
            a, b = np.flatnonzero(across.any(1)), np.flatnonzero(across.any(0))
            left = np.concatenate([i[a], i[across[:, b].argmax(0)]])
            right = np.concatenate([j[across[a].argmax(1)], j[b]])
            edges = np.ones(len(left), np.int8), (labels[left], labels[right])
            graph = coo_array(edges, shape=(len(rows), len(rows)))
            labels = connected_components(graph, directed=False)[1][labels]
    return len(np.unique(labels))


def no_neighbour(w: Tensor, eps: float) -> int:
    """Number of prototypes without any other within eps (``1 - cos < eps``): neither copies nor copied.

    Arguments and errors as `greedy_cover`. Compares all pairs.
    """
    rows = Rows(w)
    has = np.zeros(len(rows), bool)
    for i, j, near in _near_tiles(rows, eps):
        has[i] |= near.any(1)
        has[j] |= near.any(0)
    return int((~has).sum())


def row_has_neighbour(w: Tensor, which: Tensor, eps: float) -> np.ndarray:
    """For each of the rows ``which`` (n,) int64 of w, whether any other row lies within eps: (n,) bool."""
    rows = Rows(w)
    everything = torch.arange(len(rows), device=rows.unit.device)
    has = np.zeros(len(which), bool)
    step = rows_at_once(len(rows))
    for start in range(0, len(which), step):
        part = which[start : start + step].to(everything.device)
        cos = rows.product(rows.unit[part], rows.unit)
        cos[torch.arange(len(part), device=cos.device), part] = -2
        has[start : start + step] = rows.near(cos.cpu().numpy(), part, everything, eps).any(1)
    return has


def cosine_argmax(z: Tensor, w: Tensor, block: int | None = None) -> Tensor:
    """For every row of z, the row of w with the largest cosine; ties go to the lowest index.

    Rows of w whose float64 cosines with z agree to 1e-12 count as tied, so exact duplicates always resolve to
    the first of them.

    Args:
        z: (n, D) floating. w: (K, D) floating, on the same device.
        block: rows of z handled at a time; affects memory, never the result.

    Returns:
        (n,) int64 in [0, K), on the device of ``z``.

    Raises:
        ValueError: shapes disagree, or a row of either is zero or non-finite.
    """
    queries, keys = Rows(z, "z"), Rows(w, "w")
    if z.shape[1] != w.shape[1]:
        raise ValueError(f"z has {z.shape[1]} columns and w has {w.shape[1]}; both must live in the same space")
    block = _checked_block(block) or rows_at_once(len(keys), least=1)
    nearest = torch.empty(len(queries), dtype=torch.long, device=queries.unit.device)
    for start in range(0, len(queries), block):
        cos = queries.product(queries.unit[start : start + block], keys.unit)
        top, index = cos.max(1)
        # A second search for the largest is several times faster than counting those near the first.
        second = cos.scatter_(1, index[:, None], -2.0).amax(1)
        close = torch.nonzero(second >= top - 2 * queries.slack)[:, 0]
        for group in close.split(rows_at_once(len(keys), least=1)) if len(close) else ():
            index[group] = _argmax64(queries.double(group + start), keys)
        nearest[start : start + block] = index
    return nearest.to(z.device)


def _argmax64(z: Tensor, keys: "Rows") -> Tensor:
    step = rows_at_once(z.shape[1])
    chunks = torch.arange(len(keys), device=z.device).split(step)
    cos = torch.cat([z @ keys.double(chunk).T for chunk in chunks], 1)
    return (cos >= cos.amax(1, keepdim=True) - 1e-12).byte().argmax(1)


def _checked_block(block: int | None) -> int | None:
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}; leave it out for the default")
    return block


def _resolve(near: np.ndarray) -> np.ndarray:
    """Greedy cover of one block from its symmetric matrix of near pairs, (S, S) bool -> kept, (S,) bool."""
    removed = np.zeros(len(near), bool)
    # Rows without a neighbour remove nothing. A kept row's earlier neighbours are removed already.
    for i in np.flatnonzero(near.any(1)).tolist():
        if not removed[i]:
            np.logical_or(removed, near[i], out=removed)
    return ~removed


def _cover(rows: Rows, eps: float, block: int | None, progress: Callable[[float], None] = lambda share: None) -> Tensor:
    low = band(eps, rows.slack)[0]
    block = _checked_block(block) or (len(rows) if len(rows) <= _SMALL else _BLOCK)
    prefix = rows.prefix(eps)
    device = rows.unit.device
    kept = torch.empty(len(rows), dtype=torch.long, device=device)
    # The kept rows side by side, so that a tile is a slice. As long as all are kept, they are.
    unit, bound = rows.unit, prefix
    count, work = 0, 0.0
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        ids = torch.arange(start, stop, device=device)
        own_bound = None if prefix is None else prefix[start:stop]
        for t in range(0, count, TILE):
            tile = slice(t, min(t + TILE, count))
            suspects = ids
            if prefix is not None and own_bound is not None and bound is not None:
                bounds = rows.product(own_bound, bound[tile])
                which = torch.nonzero(bounds.amax(1) >= low)[:, 0]
                if not len(which):
                    continue
                suspects = ids[which]
                pairs = torch.nonzero(bounds[which] >= low) if len(which) <= _FEW_ROWS else None
                if pairs is not None and len(pairs) <= _FEW_EACH * len(which):
                    near = rows.pairs_near(suspects[pairs[:, 0]], kept[tile][pairs[:, 1]], eps)
                    removed = suspects[pairs[near, 0]]
                else:
                    removed = _near_any(rows, suspects, unit[tile], kept[tile], eps)
            else:
                removed = _near_any(rows, suspects, unit[tile], kept[tile], eps)
            if len(removed):
                ids = ids[~torch.isin(ids, removed)]
                own_bound = None if prefix is None else prefix[ids]
            if not len(ids):
                break
        if len(ids):
            ids = ids[_kept_inside(rows, prefix, ids, eps)]
        end = count + len(ids)
        if end < stop and unit is rows.unit:
            unit = torch.empty_like(unit)  # what is never written takes no memory
            unit[:count] = rows.unit[:count]
            if prefix is not None:
                bound = torch.empty_like(prefix)
                bound[:count] = prefix[:count]
        kept[count:end] = ids
        if unit is not rows.unit:
            unit[count:end] = rows.unit[ids]
            if prefix is not None and bound is not None:
                bound[count:end] = prefix[ids]
        count = end
        work += (stop - start) * count
        left = len(rows) - stop
        progress(work / (work + left * (count + len(ids) / (stop - start) * left / 2)))
    return kept[:count].clone()


def _near_any(rows: Rows, suspects: Tensor, unit: Tensor, kept: Tensor, eps: float) -> Tensor:
    """Those of the rows ``suspects`` that lie within eps of any of the rows ``kept``, whose vectors are ``unit``."""
    low, high = band(eps, rows.slack)
    cos = rows.product(rows.unit[suspects], unit)
    top = cos.amax(1)
    near = top > high
    unsure = torch.nonzero((top >= low) & ~near)[:, 0]
    if len(unsure):
        exact = rows.near(cos[unsure].cpu().numpy(), suspects[unsure], kept, eps)
        near[unsure] = torch.from_numpy(exact.any(1)).to(near.device)
    return suspects[near]


def _kept_inside(rows: Rows, prefix: Tensor | None, ids: Tensor, eps: float) -> Tensor:
    keep = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    linked = torch.arange(len(ids), device=ids.device)
    if prefix is not None:
        bound = rows.product(prefix[ids], prefix[ids]).fill_diagonal_(-2)
        linked = torch.nonzero(bound.amax(1) >= band(eps, rows.slack)[0])[:, 0]
    if len(linked):
        doubtful = ids[linked]
        inside = _resolve(rows.near(rows.cosines(doubtful, doubtful), doubtful, doubtful, eps))
        keep[linked] = torch.from_numpy(inside).to(ids.device)
    return keep


def _near_tiles(rows: Rows, eps: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tiles (i, j, near) that together hold every pair of rows within eps, in either order, at least once."""
    low, _ = band(eps, rows.slack)
    prefix = rows.prefix(eps)
    everything = torch.arange(len(rows), device=rows.unit.device)
    for start in range(0, len(rows), _BLOCK):
        block = everything[start : start + _BLOCK]
        for tile in (block, *everything[start + _BLOCK :].split(TILE)):
            i = block
            if not len(tile):  # the last block has nothing to its right
                continue
            if prefix is not None:
                bound = rows.product(prefix[block], prefix[tile])
                if tile is block:
                    bound.fill_diagonal_(-2)
                i = block[bound.amax(1) >= low]
                if not len(i):
                    continue
            j = i if tile is block else tile
            near = rows.near(rows.cosines(i, j), i, j, eps)
            if near.any():
                yield i.cpu().numpy(), j.cpu().numpy(), near
