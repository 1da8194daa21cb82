"""The minimum spanning tree of a matrix's rows under cosine distance, in about one pass over half of all pairs.

It is found without a K × K matrix, and without the dozen passes that adding the shortest edges round by round would
take: a rough tree is made first, and one pass over all pairs keeps only the pairs that improve it.

Whether a pair improves a tree depends on the longest edge on the path between the two. In the order in which
the tree's merges concatenate the rows, that is the largest of the gaps between their two places (the cophenetic
distance of single linkage), so over a tile of rows and columns to their right it splits into a number per row
and a number per column, and a row maximum and a column maximum decide for the whole tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from uncollapse.neighbours.close_pairs import Rows

_PIVOTS = 512
_FIRST_PANEL, _PANEL, _TILE = 64, 1024, 4096
_BUFFER = 2_000_000  # improving pairs kept before the tree is rebuilt: 24 MB


@dataclass(frozen=True)
class SpanningTree:
    """A minimum spanning tree of K rows under cosine distance, up to rounding.

    Every bottleneck (the longest edge on the path between two rows) is at most ``slack`` too long, so a
    component count read from ``lengths`` is exact at any ε further than ``slack`` from every length.
    """

    edges: np.ndarray
    """(2, K - 1) int64, the two rows of each edge."""
    lengths: np.ndarray
    """(K - 1,) float64 edge lengths, ascending, in [0, 2]."""
    nearest: np.ndarray
    """(K,) float64 distance of each row to its nearest other row; within ``slack``. Empty for a single row."""
    slack: float


def spanning_tree(w: Tensor, progress: Callable[[float], None] = lambda share: None) -> SpanningTree:
    """The minimum spanning tree of the rows of w under cosine distance.

    Time: about half a K × K product, and what improves the tree. Memory: a few copies of ``w`` and O(K).

    Args:
        w: (K, D) floating, any device and dtype; rows need not be normalised.
        progress: told the share of the pairs that have been compared.

    Raises:
        ValueError: ``w`` is not such a matrix or has a zero or non-finite row.
    """
    rows = Rows(w)
    slack = 4 * rows.slack
    if len(rows) == 1:
        return SpanningTree(np.empty((2, 0), np.int64), np.empty(0), np.empty(0), slack)
    nearest = np.full(len(rows), -2.0, np.float32)  # as cosines
    tree = _rough_tree(rows)
    order, gaps = _leaf_order(tree, len(rows))
    pending = [np.empty((3, 0))]
    done = np.zeros(len(rows), bool)
    width, waiting = _FIRST_PANEL, 0
    while not done.all():
        panel = order[~done[order]][:width]
        edges = _improving(rows, order, gaps, done, panel, nearest)
        done[panel] = True
        pending += edges
        waiting += sum(f.shape[1] for f in edges)
        # Early panels teach the tree most, and the sharper it is the fewer pairs have to be kept.
        if waiting > min(_BUFFER, 4 * len(rows)) or width < _PANEL:
            tree = _merge_tree(tree, pending, len(rows))
            pending, waiting = [np.empty((3, 0))], 0
            order, gaps = _leaf_order(tree, len(rows))
        width = min(2 * width, _PANEL)
        progress(1 - (1 - float(done.mean())) ** 2)
    tree = _merge_tree(tree, pending, len(rows))
    lengths = _lengths64(rows, tree)
    by_length = np.argsort(lengths, kind="stable")
    ends = tree[:2, by_length].astype(np.int64)
    return SpanningTree(ends, lengths[by_length], np.clip(1 - nearest.astype(np.float64), 0, 2), slack)


# -------------------------------------------------------------------------------------------- the pass


def _rough_tree(rows: Rows) -> np.ndarray:
    """(3, K - 1) of row, row, cosine: every row tied to its nearest of some pivots, and a tree of the pivots."""
    pivots = torch.linspace(0, len(rows) - 1, min(_PIVOTS, len(rows))).long().unique()
    unit = rows.unit[pivots.to(rows.unit.device)]
    index, cosine = [], []
    for part in rows.unit.split(8192):
        top, at = (part @ unit.T).max(1)
        index.append(at.cpu())
        cosine.append(top.cpu())
    own = pivots.numpy()
    ties = np.stack([np.arange(len(rows)), own[torch.cat(index).numpy()], torch.cat(cosine).numpy()])
    ties = ties[:, ~np.isin(np.arange(len(rows)), own)]
    cos = (unit @ unit.T).cpu().numpy()
    a, b = np.triu_indices(len(own), 1)
    return _merge_tree(ties, [np.stack([own[a], own[b], cos[a, b]])], len(rows))


def _merge_tree(tree: np.ndarray, more: list[np.ndarray], count: int) -> np.ndarray:
    """The minimum spanning tree of the tree's edges and more, as (3, K - 1)."""
    a, b, cos = np.concatenate([tree, *more], axis=1)
    # Stored as 3 - cos, because the sparse solver takes a zero for a missing edge. Of equal pairs the closest
    # must win, and building the sparse matrix would add them up.
    low, high = np.minimum(a, b).astype(np.int64), np.maximum(a, b).astype(np.int64)
    best = np.lexsort((-cos, low * count + high))
    low, high, cos = low[best], high[best], cos[best]
    first = np.ones(len(low), bool)
    first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    graph = coo_array((3 - cos[first], (low[first], high[first])), shape=(count, count))
    merged = minimum_spanning_tree(graph.tocsr()).tocoo()
    return np.stack([merged.row, merged.col, 3 - merged.data])


def _leaf_order(tree: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order in which merging the closest first concatenates them, and the cosine between places.

    Returns:
        (K,) rows, and (K - 1,) cosines: the lowest of those between two places is the bottleneck of their rows.
    """
    by_length = np.argsort(-tree[2], kind="stable")
    left, right = tree[0][by_length].astype(np.int64).tolist(), tree[1][by_length].astype(np.int64).tolist()
    parent = list(range(count))
    last = list(range(count))  # of the chain that a root heads
    following, gap = [-1] * count, [0.0] * count
    for a, b, cos in zip(left, right, tree[2][by_length].tolist(), strict=True):
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        following[last[a]], gap[last[a]] = b, cos
        last[a], parent[b] = last[b], a
    order = np.empty(count, np.int64)
    at = a if count > 1 else 0
    while parent[at] != at:
        at = parent[at]
    for place in range(count):
        order[place] = at
        at = following[at]
    return order, np.asarray(gap)[order[:-1]]


def _improving(
    rows: Rows, order: np.ndarray, gaps: np.ndarray, done: np.ndarray, panel: np.ndarray, nearest: np.ndarray
) -> list[np.ndarray]:
    """Pairs of a panel row with a row that is not done, closer than the tree's bottleneck between them."""
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    split = position[panel[-1]]
    from_right = np.minimum.accumulate(gaps[position[panel[0]] : split][::-1])[::-1]
    of_row = np.append(from_right, np.inf)[position[panel] - position[panel[0]]]  # up to the panel's end
    from_left = np.append(np.inf, np.minimum.accumulate(gaps[split:]))
    right = order[split + 1 :]
    right = right[~done[right]]
    of_column = from_left[position[right] - split]
    device = rows.unit.device
    unit = rows.unit[torch.from_numpy(panel).to(device)]
    # Inside the panel the bottleneck does not split, but the panel is small enough to write it out.
    inside = rows.product(unit, unit).fill_diagonal_(-2).cpu().numpy()
    nearest[panel] = np.maximum(nearest[panel], inside.max(1))
    at, to = _places(np.triu(inside > _between(gaps, position[panel]) + rows.slack, 1))
    edges = [np.stack([panel[at], panel[to], inside[at, to]])]
    for start in range(0, len(right), _TILE):
        columns = right[start : start + _TILE]
        cos = rows.product(unit, rows.unit[torch.from_numpy(columns).to(device)])
        by_row, by_column = cos.amax(1).cpu().numpy(), cos.amax(0).cpu().numpy()
        nearest[panel] = np.maximum(nearest[panel], by_row)
        nearest[columns] = np.maximum(nearest[columns], by_column)
        row_limit = of_row + rows.slack
        column_limit = of_column[start : start + _TILE] + rows.slack
        # Closer than the lower of two limits: than the one of its row, or than the one of its column.
        i, j = np.flatnonzero(by_row > row_limit), np.flatnonzero(by_column > column_limit)
        if not len(i) and not len(j):
            continue
        values = cos.cpu().numpy()
        if len(i):
            at, to = _places(values[i] > row_limit[i][:, None])
            edges.append(np.stack([panel[i[at]], columns[to], values[i[at], to]]))
        if len(j):
            at, to = _places(values[:, j] > column_limit[j])
            edges.append(np.stack([panel[at], columns[j[to]], values[at, j[to]]]))
    return edges


def _places(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.flatnonzero(flags), flags.shape[1])  # np.nonzero is far slower


def _between(gaps: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, n) lowest gap between each two of n ascending places; meaningful above the diagonal."""
    steps = np.full((len(places), len(places)), np.inf, np.float32)
    if len(places) > 1:
        hops = np.minimum.reduceat(gaps[: places[-1]], places[:-1]).astype(np.float32)
        steps[:, 1:] = np.where(np.triu(np.ones((len(places), len(hops)), bool)), hops, np.inf)
    return np.minimum.accumulate(steps, 1)


def _lengths64(rows: Rows, tree: np.ndarray) -> np.ndarray:
    a, b = (torch.from_numpy(side.astype(np.int64)) for side in tree[:2])
    out = []
    for left, right in zip(a.split(8192), b.split(8192), strict=True):
        device = rows.w.device
        out.append((rows.double(left.to(device)) * rows.double(right.to(device))).sum(1).cpu().numpy())
    return np.clip(1 - np.concatenate(out), 0, 2)
