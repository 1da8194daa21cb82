"""Time of unique_prototypes beside half the blocked matrix product and scikit-learn, measured in one run.

    OMP_NUM_THREADS=1 python benchmarks/unique.py [--sizes 1024 8192 65536] [--dim 256]

Half the product is the least that any method has to compute that looks at every pair in full: every row with
every row before it, into a reused buffer, results thrown away.
"""

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.neighbors import NearestNeighbors

from uncollapse.unique import EPSILONS, epsilon_sweep, unique_prototypes


def best_of(function: Callable[[], object], repeats: int) -> tuple[float, object]:
    times, result = [], None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def half_product(w: torch.Tensor, block: int = 1024, tile: int = 2048) -> None:
    buffer = torch.empty(block * tile)
    for start in range(0, len(w), block):
        rows = w[start : start + block]
        for t in range(0, start + len(rows), tile):
            columns = w[t : min(t + tile, start + len(rows))]
            torch.mm(rows, columns.T, out=buffer[: len(rows) * len(columns)].view(len(rows), -1))


def scikit_learn(w: torch.Tensor, eps: float) -> int:
    """Radius neighbours, then the same greedy scan over the lists."""
    x = torch.nn.functional.normalize(w, dim=1).numpy()
    near = NearestNeighbors(radius=eps, metric="cosine", algorithm="brute").fit(x)
    kept: set[int] = set()
    for k, others in enumerate(near.radius_neighbors(x, return_distance=False)):
        if kept.isdisjoint(others.tolist()):
            kept.add(k)
    return len(kept)


def matrices(k: int, dim: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(k, dim, generator=rng)
    modes = torch.nn.functional.normalize(torch.randn(max(1, k // 64), dim, generator=rng), dim=1)
    noise = 0.003 * torch.randn(k, dim, generator=rng)
    return {"random": random, "duplicates": modes[torch.randint(len(modes), (k,), generator=rng)] + noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--dim", type=int, default=256)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, D = {options.dim}")
    for k in options.sizes:
        repeats = 10 if k < 4096 else 3 if k < 32768 else 2
        cases = matrices(k, options.dim)
        half, _ = best_of(lambda w=cases["random"]: half_product(w), repeats)
        print(f"\nK = {k}: half the product {1e3 * half:.1f} ms")
        for name, w in cases.items():
            for eps in EPSILONS:
                seconds, count = best_of(lambda w=w, eps=eps: unique_prototypes(w, eps), repeats)
                ratio = f"{seconds / half:.2f} x half"
                print(f"  {name:10} eps {eps:<5} {count:>6} unique  {1e3 * seconds:9.1f} ms  {ratio}")
            if k <= 2048:
                seconds, _ = best_of(lambda w=w: epsilon_sweep(w), repeats)
                small, _ = best_of(lambda w=w: epsilon_sweep(w[:, :64].contiguous()), repeats)
                print(f"  {name:10} sweep of all: {1e3 * seconds:.1f} ms; D = 64: {1e3 * small:.1f} ms")
            if k == 8192:
                seconds, count = best_of(lambda w=w: scikit_learn(w, 0.025), 1)
                print(f"  {name:10} scikit-learn radius, eps 0.025: {count} unique  {1e3 * seconds:.1f} ms")


if __name__ == "__main__":
    main()
