"""Weighted kNN beside faiss, scikit-learn and the plain form: 2,000 queries, d = 384, k = 20.

    OMP_NUM_THREADS=1 python benchmarks/knn.py

``--sizes`` are numbers of prototypes in the other benchmarks; here the bank holds 10,000 rows below the largest
default size and 100,000 from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from common import Row, alternate, main
from uncollapse.measure.nearest import nearest, vote

QUERIES, WIDTH, K, TEMPERATURE = 2000, 384, 20, 0.07


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    for count in sorted({100_000 if size >= 65536 else 10_000 for size in sizes}):
        yield _row(count, device)


def _row(count: int, device: torch.device) -> Row:
    rng = torch.Generator().manual_seed(0)
    bank = normalize(torch.randn(count, WIDTH, generator=rng), dim=1).to(device)
    queries = normalize(torch.randn(QUERIES, WIDTH, generator=rng), dim=1).to(device)
    labels = torch.randint(0, 100, (count,), generator=rng).to(device)

    def ours() -> Any:
        similarity, index = nearest(bank, queries, K)
        return vote(similarity, labels[index], TEMPERATURE)

    def naive() -> Any:
        top, index = (queries @ bank.T).topk(K, 1)
        return vote(top, labels[index], TEMPERATURE)

    buffer = torch.empty(1024 * 2048, device=device)

    def product() -> None:
        for s in range(0, QUERIES, 1024):
            asked = queries[s : s + 1024]
            for t in range(0, count, 2048):
                part = bank[t : t + 2048]
                torch.mm(asked, part.T, out=buffer[: len(asked) * len(part)].view(len(asked), -1))

    calls: dict[str, Callable[[], Any]] = {"ours": ours, "limit": product, "naive": naive}
    if device.type == "cpu":
        calls |= {"faiss": _faiss(bank, queries), "scikit-learn": _sklearn(bank, queries)}
    costs = alternate({n: f for n, f in calls.items() if f is not None}, 5, 12.0)
    agree = float((costs["ours"].result == costs["naive"].result).float().mean())
    ours_, limit = costs.pop("ours"), costs.pop("limit").seconds
    peer = costs.get("faiss")
    met = ours_.seconds <= 1.35 * limit and (peer is None or peer.seconds >= 1.5 * ours_.seconds)
    return Row(
        "weighted kNN",
        f"N = {count:,}",
        ours_,
        limit,
        "matrix product",
        dict(costs),
        "≤ 1.35 × limit, faiss ≥ 1.5 ×" if count >= 100_000 else "",
        met if count >= 100_000 else None,
        f"same classes as naive: {agree:.2%}",
    )


def _faiss(bank: torch.Tensor, queries: torch.Tensor) -> Callable[[], Any] | None:
    """Exact search alone, without the vote; the index is built outside of the time."""
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(bank.numpy())
    return lambda: index.search(queries.numpy(), K)


def _sklearn(bank: torch.Tensor, queries: torch.Tensor) -> Callable[[], Any]:
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=K, algorithm="brute").fit(bank.numpy())  # of unit rows: the same order
    return lambda: near.kneighbors(queries.numpy())


if __name__ == "__main__":
    main("weighted kNN", rows)
