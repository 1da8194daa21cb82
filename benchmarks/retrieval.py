"""Exact mean average precision by rank counting, beside torchmetrics, scikit-learn and an argsort.

    OMP_NUM_THREADS=1 python benchmarks/retrieval.py [--sizes 1024 8192 65536] [--device cuda]

The sizes are of the bank. Peers get the same cosines ready-made, so their time is that of the ranking alone, and
ours has the matrix product on top.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from common import SIZES, Cost, Row, alternate, main, matmul_seconds
from uncollapse.evaluate.tasks.retrieval import average_precisions

DIM, CLASSES, QUERIES = 384, 100, 1024


def data(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=rng)
    return torch.nn.functional.normalize(
        centres[labels] + 4 * torch.randn(n, DIM, generator=rng), dim=1
    ), labels.numpy()


def argsorted(similar: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """The plain vectorised form: sort with indices, gather, cumulative sums."""
    hits = relevant.gather(1, similar.argsort(dim=1, descending=True)).double()
    precision = hits.cumsum(1) / torch.arange(1, similar.shape[1] + 1, device=similar.device)
    return (precision * hits).sum(1) / hits.sum(1)


def torchmetrics_map(similar: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.retrieval import retrieval_average_precision

    # It counts no hit whose score is not above 0, hence the shift.
    return torch.stack([retrieval_average_precision(s + 2, r) for s, r in zip(similar, relevant, strict=True)])


def scikit_learn(similar: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    from sklearn.metrics import average_precision_score

    pairs = zip(relevant.numpy(), similar.numpy(), strict=True)
    return torch.tensor([average_precision_score(r, s) for r, s in pairs])


def one_size(n: int, device: torch.device) -> Row:
    bank, bank_labels = data(n, 2)
    queries, labels = data(QUERIES, 1)
    few = 16 if n > 16384 else 64  # of the peers' queries; their time is scaled up below
    similar = (queries[:few] @ bank.T).to(device)
    relevant = torch.from_numpy(labels[:few, None] == bank_labels).to(device)
    calls = {
        "ours": lambda: average_precisions(bank, bank_labels, queries, labels, 100, device),
        "argsort": lambda: argsorted(similar, relevant),
        "torchmetrics": lambda: torchmetrics_map(similar, relevant),
    }
    if device.type == "cpu":
        calls["scikit-learn"] = lambda: scikit_learn(similar, relevant)
    costs = alternate(calls, 3)
    ours = costs.pop("ours")
    for cost in costs.values():
        expected = torch.from_numpy(ours.result["ap"][:few])
        torch.testing.assert_close(
            cost.result.cpu().double(), expected, atol=1e-3, rtol=0
        )  # last bits order close cosines
    scaled: dict[str, Cost | None] = {n: Cost(c.seconds * QUERIES / few, c.peak) for n, c in costs.items()}
    return Row(
        "mean average precision",
        f"N = {n:,}, {QUERIES:,} queries",
        ours,
        matmul_seconds(QUERIES, DIM, n, device),
        "matrix product",
        scaled,
        "faster than torchmetrics",
        costs["torchmetrics"].seconds * QUERIES / few > ours.seconds,
        f"peers: ranking of {few} queries, times {QUERIES // few}, without the product; memory of those few",
    )


def rows(sizes: Sequence[int] = SIZES, device: torch.device | str = "cpu") -> Iterator[Row]:
    for n in sizes:
        yield one_size(n, torch.device(device))


if __name__ == "__main__":
    main("Retrieval", rows)
