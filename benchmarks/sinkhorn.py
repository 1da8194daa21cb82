"""Sinkhorn's offsets without an (n, K) array beside the dense forms, three iterations at temperature 0.05.

    OMP_NUM_THREADS=1 python benchmarks/sinkhorn.py [--sizes 1024 8192 65536] [--device cuda] [--json FILE]

All sides start from projections and prototypes. Ours gives K offsets, from which a loss forms the targets; the dense
forms give the targets themselves. `unkept` is ours with the smallest tiles, which forms the logits in every iteration.
The limit is one matrix product and one exponential for each row and prototype, timed in turns with the rest. The loop
of lightly and DINOv2 is not in log space: float32 overflows at a logit of 88.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Row, alternate, main
from uncollapse.targets.sinkhorn import sinkhorn, sinkhorn_offsets

DIM = 256
BATCHES = (128, 1024)
TEMPERATURE = 0.05


def lightly(z: Tensor, weight: Tensor) -> Callable[[], object] | None:
    """lightly's SwAV codes; None where it is not installed."""
    try:
        from lightly.loss.swav_loss import sinkhorn as codes
    except ImportError:
        return None
    return lambda: codes(z @ weight.T, iterations=3, epsilon=TEMPERATURE)


def limit(z: Tensor, weight: Tensor, chunk: int = 1024) -> Callable[[], None]:
    """By chunks that stay in a cache, into memory that is used again."""
    scores = torch.empty(min(chunk, len(weight)), len(z), device=z.device)

    def work() -> None:
        for start in range(0, len(weight), len(scores)):
            torch.mm(weight[start : start + len(scores)], z.T, out=scores).exp_()

    return work


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    for k in sizes:
        for n in BATCHES:
            g = torch.Generator().manual_seed(0)
            z = F.normalize(torch.randn(n, DIM, generator=g), dim=-1).to(device)
            weight = F.normalize(torch.randn(k, DIM, generator=g), dim=-1).to(device)
            functions: dict[str, Callable[[], object]] = {
                "ours": lambda z=z, w=weight: sinkhorn_offsets(z, w, TEMPERATURE),
                "unkept": lambda z=z, w=weight: sinkhorn_offsets(z, w, TEMPERATURE, budget=1),
                "dense, log space": lambda z=z, w=weight: sinkhorn(z @ w.T / TEMPERATURE),
                "limit": limit(z, weight),
            }
            peer = lightly(z, weight)
            if peer is not None:
                functions["lightly"] = peer
            costs = alternate(functions, repeats=5, most_seconds=6.0)
            ours, least = costs.pop("ours"), costs.pop("limit").seconds
            dense = costs["dense, log space"].seconds
            yield Row(
                "sinkhorn_offsets",
                f"K = {k:,}, B = {n:,}",
                ours,
                least,
                "one product, one exp",
                {**costs, "lightly": costs.get("lightly")},
                "≥ 2 × dense in log space",
                dense >= 2 * ours.seconds,
            )


if __name__ == "__main__":
    main("sinkhorn", rows)
