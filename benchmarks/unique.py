"""Counting unique prototypes beside half the blocked matrix product, the naive form, scikit-learn and faiss.

    OMP_NUM_THREADS=1 python benchmarks/unique.py [--sizes 1024 8192 65536] [--dim 256]

Half the product is the least that any method has to compute that looks at every pair in full: every row with every
row before it, into a reused buffer, results thrown away; it is measured in turns with the rest and scaled from the
tiles' area to K²/2. Random rows have no near pairs, which is the longest way to a count; of the duplicates (K / 64
modes with noise) most rows fall at once. The rivals find all pairs within eps = 0.025, then scan greedily.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import SIZES, Row, alternate, print_rows, to_json
from uncollapse.measure.unique import EPSILONS, components, epsilon_sweep, unique_prototypes

EPS = 0.025
TARGET = 0.25


def half_product(w: Tensor, block: int = 1024, tile: int = 2048) -> float:
    """Returns the share of K² that was formed."""
    buffer, area = torch.empty(block * tile, device=w.device), 0
    for start in range(0, len(w), block):
        rows = w[start : start + block]
        for t in range(0, start + len(rows), tile):
            columns = w[t : min(t + tile, start + len(rows))]
            torch.mm(rows, columns.T, out=buffer[: len(rows) * len(columns)].view(len(rows), -1))
            area += len(rows) * len(columns)
    return area / len(w) ** 2


def greedy(lists: Callable[[int], np.ndarray], k: int) -> int:
    """The scan over each row's list of near rows."""
    kept = np.zeros(k, bool)
    for i in range(k):
        kept[i] = not kept[lists(i)].any()
    return int(kept.sum())


def naive(w: Tensor) -> int:
    """All K × K cosines at once, then one row after the other."""
    unit = F.normalize(w, dim=1)
    near = (unit @ unit.T > 1 - EPS).cpu().numpy()
    return greedy(lambda i: np.flatnonzero(near[i]), len(w))


def scikit_learn(w: Tensor) -> int:
    from sklearn.neighbors import NearestNeighbors

    x = F.normalize(w, dim=1).numpy()
    near = NearestNeighbors(radius=EPS, metric="cosine", algorithm="brute").fit(x)
    lists = near.radius_neighbors(x, return_distance=False)
    return greedy(lambda i: lists[i], len(w))


def faiss_range_search() -> Callable[[Tensor], int] | None:
    try:
        import faiss
    except ImportError:
        return None

    def count(w: Tensor) -> int:
        faiss.omp_set_num_threads(torch.get_num_threads())
        x = F.normalize(w, dim=1).numpy()
        index: Any = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        bounds, _, neighbours = index.range_search(x, 1 - EPS)
        return greedy(lambda i: neighbours[bounds[i] : bounds[i + 1]], len(w))

    return count


def matrices(k: int, dim: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(k, dim, generator=rng)
    modes = F.normalize(torch.randn(max(1, k // 64), dim, generator=rng), dim=1)
    noise = 0.003 * torch.randn(k, dim, generator=rng)
    return {"random": random, "duplicates": modes[torch.randint(len(modes), (k,), generator=rng)] + noise}


def rows(sizes: Sequence[int], device: torch.device, dim: int = 256) -> Iterator[Row]:
    faiss = faiss_range_search()
    for k in sizes:
        for kind, host in matrices(k, dim).items():
            w = host.to(device)
            functions: dict[str, Callable[[], Any]] = {
                "half": lambda w=w: half_product(w),  # type: ignore[misc]
                **{f"unique {e}": lambda w=w, e=e: unique_prototypes(w, e) for e in EPSILONS},  # type: ignore[misc]
            }
            if k <= 16384:  # beyond, the rivals need many minutes or many GiB
                functions["naive"] = lambda w=w: naive(w)  # type: ignore[misc]
                functions["scikit-learn"] = lambda w=host: scikit_learn(w)  # type: ignore[misc]
                if faiss is not None:
                    functions["faiss"] = lambda w=host: faiss(w)  # type: ignore[misc]
                functions["components"] = lambda w=w: components(w, EPS)  # type: ignore[misc]
            if k <= 2048:
                functions["sweep"] = lambda w=w: epsilon_sweep(w)  # type: ignore[misc]
            costs = alternate(functions, 10 if k < 4096 else 2, 10.0)
            limit = costs["half"].seconds * 0.5 / costs["half"].result
            size, rivals = f"K = {k:,}, {kind}", ("naive", "scikit-learn", "faiss")
            for eps in EPSILONS:
                cost = costs[f"unique {eps}"]
                headline = eps == EPS
                others = {name: costs.get(name) for name in rivals} if headline else {}
                for name, other in others.items():  # float32 rivals may take pairs on the very edge for others
                    assert other is None or abs(other.result - cost.result) <= 1 + k // 1000, (name, other, cost)
                aimed = headline and kind == "random" and k >= 8192
                note = f"{cost.result:,} unique"
                if headline and "components" in costs:
                    merged = costs["components"]
                    note += f"; {merged.result:,} components in {1e3 * merged.seconds:.1f} ms"
                yield Row(
                    f"unique_prototypes, ε = {eps}",
                    size,
                    cost,
                    limit,
                    "half the product",
                    others,
                    f"≤ {TARGET} × half the product" if aimed else "",
                    cost.seconds <= TARGET * limit if aimed else None,
                    note,
                )
            if "sweep" in costs:
                yield Row("epsilon_sweep, four ε", size, costs["sweep"], limit, "half the product")
                if dim > 64:
                    narrow = w[:, :64].contiguous()
                    small = alternate({"sweep": lambda w=narrow: epsilon_sweep(w)}, 10)["sweep"]  # type: ignore[misc]
                    yield Row("epsilon_sweep, four ε", f"{size}, D = 64", small)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where = torch.device(options.device)
    measured = list(rows(options.sizes, where, options.dim))
    print_rows("unique", measured, where)
    if options.json:
        import json

        options.json.write_text(json.dumps(to_json(measured), indent=1) + "\n")
