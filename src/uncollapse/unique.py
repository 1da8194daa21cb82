"""How many prototypes are different from one another, counted exactly and without a K x K matrix.

Distance is cosine distance, ``1 - cos``. Two countings are in use and they can differ a lot on the same
matrix: the greedy cover of the prototype-collapse papers (`greedy_cover`, order-dependent) and the connected
components of the graph of close pairs (`components`, chains merge; never more than the greedy count).

Every decision is the one float64 arithmetic takes. The bulk of the work is done in float32, whose rounding is
bounded, and only pairs closer to the threshold than that bound are looked at again in float64, so results do
not depend on the block size, on the device, or on the matrix-product precision set for the process.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

EPSILONS = (0.025, 0.1, 0.25, 0.5)

_SMALL = 2048  # up to here one K x K product (16 MB) is the fastest way
_BLOCK, _TILE = 1024, 2048  # rows and columns of a tile: 8 MB in float32, about a level-2 cache
_ELEMENTS = 1 << 24  # most elements of any temporary: 64 MB in float32
_PREFIX_FROM = 4096  # below this the prefix bound costs more than it saves


def greedy_cover(w: Tensor, eps: float, block: int | None = None) -> Tensor:
    """Indices of the unique prototypes: a prototype is kept unless it lies within eps of one kept before it.

    Scans in index order, as the papers on partial prototype collapse do; the kept rows are pairwise at least
    eps apart and every row lies within eps of a kept one. The count depends on the order of the rows and need
    not fall monotonically with eps.

    Args:
        w: (K, D) prototypes of any floating dtype, on any device; rows need not be normalised.
        eps: cosine distance in (0, 2]; row k is redundant iff ``1 - cos < eps`` for some kept row.
        block: rows handled at a time; affects speed and memory, never the result.

    Returns:
        (M,) int64, ascending, on the device of ``w``.

    Raises:
        ValueError: ``w`` is not a (K, D) floating tensor or has a zero or non-finite row; eps or block is out
            of range.
    """
    return _cover(Rows(w), eps, block).to(w.device)


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
    step = max(1, _ELEMENTS // 4 // len(rows))
    for start in range(0, len(which), step):
        mine = which[start : start + step].to(everything.device)
        cos = rows.product(rows.unit[mine], rows.unit)
        cos[torch.arange(len(mine), device=cos.device), mine] = -2
        has[start : start + step] = rows.near(cos.cpu().numpy(), mine, everything, eps).any(1)
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
    block = _checked_block(block) or max(1, _ELEMENTS // 4 // len(keys))
    found = torch.empty(len(queries), dtype=torch.long, device=queries.unit.device)
    for start in range(0, len(queries), block):
        cos = queries.product(queries.unit[start : start + block], keys.unit)
        top, index = cos.max(1)
        rivals = (cos >= (top - 2 * queries.slack)[:, None]).sum(1)
        for group in torch.nonzero(rivals > 1)[:, 0].split(max(1, _ELEMENTS // 2 // len(keys))):
            index[group] = _argmax64(queries.double(group + start), keys)
        found[start : start + block] = index
    return found.to(z.device)


def _argmax64(z: Tensor, keys: "Rows") -> Tensor:
    step = max(1, _ELEMENTS // 2 // z.shape[1])
    chunks = torch.arange(len(keys), device=z.device).split(step)
    cos = torch.cat([z @ keys.double(chunk).T for chunk in chunks], 1)
    return (cos >= cos.amax(1, keepdim=True) - 1e-12).byte().argmax(1)


class Rows:
    """The rows of a matrix on the unit sphere, in float32, with what is needed to decide exactly."""

    def __init__(self, w: Tensor, name: str = "w") -> None:
        if w.ndim != 2 or not w.is_floating_point() or 0 in w.shape:
            raise ValueError(
                f"{name} must be a non-empty floating (rows, dimensions) tensor, "
                f"got shape {tuple(w.shape)} and dtype {w.dtype}; pass one vector per row"
            )
        self.w = w.detach().cpu() if w.device.type == "mps" else w.detach()  # mps has no float64
        self.unit = torch.empty(self.w.shape, dtype=torch.float32, device=self.w.device)
        for chunk in self.chunks():
            self.unit[chunk] = _normalised(self.w[chunk])
        bad = torch.nonzero(~torch.isfinite(self.unit[:, 0]))[:, 0]
        if len(bad):
            first = ", ".join(str(int(i)) for i in bad[:5])
            raise ValueError(
                f"{name} has {len(bad)} zero or non-finite rows (first: {first}); "
                "they have no direction, so drop them or find out why they are there"
            )
        self.slack = rounding(w.shape[1])
        self._basis: Tensor | None = None
        self._scratch = torch.empty(0, device=self.w.device)

    def __len__(self) -> int:
        return len(self.w)

    def chunks(self) -> list[slice]:
        step = max(1, _ELEMENTS // 64 // self.w.shape[1])  # small, to stay in cache
        return [slice(s, s + step) for s in range(0, len(self.w), step)]

    def double(self, i: Tensor) -> Tensor:
        return _normalised(self.w[i])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T in float32 whatever autocast says. Valid until the next product: they share their memory,

        because the page faults of a fresh tile cost as much as the arithmetic.
        """
        size = len(a) * len(b)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, device=a.device)
        return torch.mm(a, b.T, out=self._scratch[:size].view(len(a), len(b)))

    def cosines(self, i: Tensor, j: Tensor) -> np.ndarray:
        """Float32 cosines of rows i with rows j; -2 on the diagonal where both are the same list."""
        cos = self.product(self.unit[i], self.unit[j])
        if i is j:
            cos.fill_diagonal_(-2)
        return cos.cpu().numpy()

    def near(self, cos: np.ndarray, i: Tensor, j: Tensor, eps: float) -> np.ndarray:
        """Which pairs of rows (i, j) are within eps, given their float32 cosines."""
        low, high = _band(eps, self.slack)
        perhaps = cos >= low
        if not perhaps.any():
            return perhaps
        near = cos > high
        if np.count_nonzero(perhaps) > np.count_nonzero(near):
            a, b = np.divmod(np.flatnonzero(perhaps ^ near), near.shape[1])  # np.nonzero is far slower
            # On the CPU whatever the device, because the order of a sum is part of a float64 result.
            left, right, step = i.cpu()[a], j.cpu()[b], max(1, _ELEMENTS // 8 // self.w.shape[1])
            for s in range(0, len(a), step):
                x = _normalised(self.w[left[s : s + step].to(self.w.device)].cpu())
                y = _normalised(self.w[right[s : s + step].to(self.w.device)].cpu())
                near[a[s : s + step], b[s : s + step]] = (1 - (x * y).sum(1) < eps).numpy()
        return near

    def prefix(self, eps: float) -> Tensor | None:
        """(K, m + 1) rows whose products bound the cosines from above, or None where that would not pay.

        In any orthonormal basis the cosine is at most the product over the first m coordinates plus the
        product of the lengths of what is left. The basis is the principal one of a sample, whose prefix holds
        the most; m is the one that leaves the least work on that sample.
        """
        dim, device = self.w.shape[1], self.w.device
        if len(self) < _PREFIX_FROM or dim > 1024:  # the basis costs D^3
            return None
        sample = self.double(torch.linspace(0, len(self) - 1, 1024, device=device).long())
        if self._basis is None:
            self._basis = torch.linalg.eigh(sample.T @ sample)[1].flip(1)
        turned = sample @ self._basis
        low = _band(eps, self.slack)[0]
        apart = (sample @ sample.T) < low
        best, chosen = 0.8, 0
        for m in (dim // 8, dim // 4, dim // 2):
            bound = _with_rest(turned[:, :m])
            missed = float(((bound @ bound.T >= low) & apart).double().mean())
            # A row is computed in full where a tile holds one such pair; 0.1 is what reading a tile costs.
            cost = m / dim + min(1.0, missed * _TILE) + 0.1
            if cost < best:
                best, chosen = cost, m
        if not chosen:
            return None
        first = self._basis[:, :chosen]
        out = torch.empty((len(self), chosen + 1), dtype=torch.float32, device=device)
        for chunk in self.chunks():
            out[chunk] = _with_rest(_normalised(self.w[chunk]) @ first).float()
        return out


def _with_rest(first: Tensor) -> Tensor:
    """Appends what the first coordinates leave of a unit length, so that one product gives the bound."""
    rest = (1 - (first * first).sum(1, keepdim=True)).clamp_min(0).sqrt()
    return torch.cat([first, rest], 1)


def _normalised(x: Tensor) -> Tensor:
    x = x.double()
    x = x / x.abs().amax(1, keepdim=True)  # first, so that squares neither overflow nor vanish
    return x / (x * x).sum(1, keepdim=True).sqrt()


def rounding(dim: int) -> float:
    """Largest error of a float32 cosine: of any order of summation, plus of the rounded inputs."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        matmul = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        reduced = any(getattr(m, "fp32_precision", "ieee") not in ("ieee", "none") for m in matmul)
    else:  # torch before 2.9
        reduced = torch.get_float32_matmul_precision() != "highest"
    # TF32 and bf16 products round each input by at most 2**-9 (2**-8 where a kernel truncates).
    return (dim + 8) * 2.0**-24 + (2.0**-6 if reduced else 0.0)


def _band(eps: float, slack: float) -> tuple[float, float]:
    """Cosines below the first are surely at least eps apart, above the second surely closer."""
    if not 0 < eps <= 2:
        raise ValueError(f"eps is a cosine distance, 1 - cos, and must lie in (0, 2], got {eps}")
    return 1 - eps - slack, 1 - eps + slack


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


def _cover(rows: Rows, eps: float, block: int | None) -> Tensor:
    low, high = _band(eps, rows.slack)
    block = _checked_block(block) or (len(rows) if len(rows) <= _SMALL else _BLOCK)
    prefix = rows.prefix(eps)
    device = rows.unit.device
    # The kept rows side by side, so that a tile is a slice; what is never written takes no memory.
    kept, unit = torch.empty(len(rows), dtype=torch.long, device=device), torch.empty_like(rows.unit)
    bound = None if prefix is None else torch.empty_like(prefix)
    count = 0
    for start in range(0, len(rows), block):
        ids = torch.arange(start, min(start + block, len(rows)), device=device)
        for t in range(0, count, _TILE):
            tile = slice(t, min(t + _TILE, count))
            suspects = ids
            if prefix is not None and bound is not None:
                suspects = ids[rows.product(prefix[ids], bound[tile]).amax(1) >= low]
            if not len(suspects):
                continue
            cos = rows.product(rows.unit[suspects], unit[tile])
            top = cos.amax(1)
            redundant = top > high
            unsure = torch.nonzero((top >= low) & ~redundant)[:, 0]
            if len(unsure):
                near = rows.near(cos[unsure].cpu().numpy(), suspects[unsure], kept[tile], eps)
                redundant[unsure] = torch.from_numpy(near.any(1)).to(device)
            if redundant.any():
                ids = ids[~torch.isin(ids, suspects[redundant])]
            if not len(ids):
                break
        if not len(ids):
            continue
        ids = ids[_kept_inside(rows, prefix, ids, eps)]
        end = count + len(ids)
        kept[count:end], unit[count:end] = ids, rows.unit[ids]
        if prefix is not None and bound is not None:
            bound[count:end] = prefix[ids]
        count = end
    return kept[:count].clone()


def _kept_inside(rows: Rows, prefix: Tensor | None, ids: Tensor, eps: float) -> Tensor:
    keep = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    linked = torch.arange(len(ids), device=ids.device)
    if prefix is not None:
        bound = rows.product(prefix[ids], prefix[ids]).fill_diagonal_(-2)
        linked = torch.nonzero(bound.amax(1) >= _band(eps, rows.slack)[0])[:, 0]
    if len(linked):
        some = ids[linked]
        inside = _resolve(rows.near(rows.cosines(some, some), some, some, eps))
        keep[linked] = torch.from_numpy(inside).to(ids.device)
    return keep


def _near_tiles(rows: Rows, eps: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tiles (i, j, near) that together hold every pair of rows within eps, in either order, at least once."""
    low, _ = _band(eps, rows.slack)
    prefix = rows.prefix(eps)
    everything = torch.arange(len(rows), device=rows.unit.device)
    for start in range(0, len(rows), _BLOCK):
        block = everything[start : start + _BLOCK]
        for tile in (block, *everything[start + _BLOCK :].split(_TILE)):
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
