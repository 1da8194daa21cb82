"""View information beside the plain form of the same bound: one scale over cosines, as a dense log-softmax.

    OMP_NUM_THREADS=1 python benchmarks/information.py [--sizes 1024 8192 65536] [--device cuda]

2,000 scored images of four views, fitted on 4,000 others of two; the limit is the product of all those projections with
all prototypes, which the argmax alone needs.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from common import SIZES, Cost, Row, alternate, main, matmul_seconds
from uncollapse import view_information

DIM, IMAGES, VIEWS, FIT_IMAGES, FIT_VIEWS = 256, 2000, 4, 4000, 2
DENSE_MOST = 8192
"""Prototypes up to which the dense form is run: at 65,536 its arrays take 10 GB."""


def made(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prototypes, and views near the prototype that each image has."""
    generator = torch.Generator().manual_seed(0)
    w = F.normalize(torch.randn(k, DIM, generator=generator), dim=-1)

    def views(v: int, n: int) -> torch.Tensor:
        own = torch.randint(k, (n,), generator=generator)
        return F.normalize(w[own] + 0.08 * torch.randn(v, n, DIM, generator=generator), dim=-1)

    return views(VIEWS, IMAGES).to(device), w.to(device), views(FIT_VIEWS, FIT_IMAGES).to(device)


def dense(z: torch.Tensor, w: torch.Tensor, z_fit: torch.Tensor) -> float:
    """E[log q(b | z) - log p(b)] in bits, q = softmax(scale · cos + log p), the scale fitted by L-BFGS."""
    p = torch.bincount((z_fit @ w.T).argmax(-1).flatten(), minlength=len(w)) + 0.5
    log_p = (p / p.sum()).log()
    cos = z_fit[0] @ w.T
    target = (z_fit[1] @ w.T).argmax(-1)
    scale = torch.tensor(10.0, device=z.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([scale], max_iter=10)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(scale * cos + log_p, target)
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        chosen = (z @ w.T).argmax(-1)
        rates = [
            (scale * (z[v] @ w.T) + log_p).log_softmax(-1).gather(1, chosen[u, :, None])[:, 0] - log_p[chosen[u]]
            for v in range(len(z))
            for u in range(len(z))
            if u != v
        ]
    return float(torch.stack(rates).mean()) / 0.6931471805599453


def one_size(k: int, device: torch.device) -> Row:
    z, w, z_fit = made(k, device)
    calls = {"ours": lambda: view_information(z, w, z_fit)}
    if k <= DENSE_MOST:
        calls["dense"] = lambda: dense(z, w, z_fit)
    costs = alternate(calls, 3)
    ours = costs.pop("ours")
    others: dict[str, Cost | None] = {"dense, one scale": costs.get("dense")}
    bits = f"{ours.result.bits:.2f} ± {ours.result.standard_error:.2f} bits"
    if "dense" in costs:
        bits += f", the dense form {costs['dense'].result:.2f}"
    return Row(
        "view information",
        f"K = {k:,}, n = {IMAGES:,}",
        ours,
        matmul_seconds(VIEWS * IMAGES + FIT_VIEWS * FIT_IMAGES, DIM, k, device),
        "matrix product",
        others,
        "at most a minute",
        ours.seconds <= 60,
        bits,
    )


def rows(sizes: Sequence[int] = SIZES, device: torch.device | str = "cpu") -> Iterator[Row]:
    for k in sizes:
        yield one_size(k, torch.device(device))


if __name__ == "__main__":
    main("View information", rows)
