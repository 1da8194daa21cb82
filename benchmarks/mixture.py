"""One update of the online mixture (E-step and M-step) beside naive forms, scikit-learn and the hardware's limit.

    OMP_NUM_THREADS=1 python benchmarks/mixture.py [--sizes 1024 8192 65536] [--device cuda] [--json FILE]

The limit is the two matrix products, one exponential for each row and component, and reading and writing the means,
timed in turns with the rest, so that a busy machine slows all of them; for a diagonal Gaussian the products are twice
as deep. `Sinkhorn` forms all scores again whenever offsets move far; on these clustered rows they do
in each of its three iterations, so that it forms the scores four times where the limit counts one. scikit-learn's row
is one iteration of `GaussianMixture.fit` from the same means: the same E- and M-step plus its lower bound, without
forgetting; it keeps (n, K) arrays, and starts with a random (n, K) of its own.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Cost, Row, alternate, main
from uncollapse.prototypes.mixture import OnlineMixture

DIM = 256
BATCHES = (128, 1024)
TARGETS = {128: 1.6, 1024: 1.35}
MOST_BYTES = 4 << 30


def clustered(n: int, seed: int, device: torch.device) -> Tensor:
    """Unit rows around 64 directions."""
    centres = F.normalize(torch.randn(64, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    g = torch.Generator().manual_seed(seed)
    picked = centres[torch.randint(len(centres), (n,), generator=g)]
    return F.normalize(picked + 0.05 * torch.randn(n, DIM, generator=g), dim=-1).to(device)


def build(k: int, n: int, covariance: str, device: torch.device, **options: object) -> OnlineMixture:
    generator = torch.Generator().manual_seed(0)
    options = {"balance": "none", "memory_steps": 20.0, **options}
    return OnlineMixture(k, DIM, n, covariance, generator=generator, **options).to(device)  # type: ignore[arg-type]


def dense(mixture: OnlineMixture, x: Tensor) -> Tensor:
    """Both steps with (n, K) arrays: what the formulas say, with matrix products."""
    p = mixture.responsibilities(x)
    mass = p.sum(0).clamp_min(1e-30).unsqueeze(-1)
    mean = p.T @ x / mass
    variance = p.T @ x.square() / mass - mean.square()
    return mean + (variance if mixture.covariance == "diagonal" else variance.mean(-1, keepdim=True))


def broadcast(mixture: OnlineMixture, x: Tensor) -> Tensor:
    """Both steps with (n, K, D) arrays: as such code is often written."""
    variance = mixture.variance
    difference = x[:, None] - mixture.mean
    p = torch.softmax(-0.5 * (difference.square() / variance + variance.log()).sum(-1), dim=-1)
    mass = p.sum(0).clamp_min(1e-30).unsqueeze(-1)
    mean = (p.unsqueeze(-1) * x[:, None]).sum(0) / mass
    return mean + (p.unsqueeze(-1) * difference.square()).sum(0) / mass


def scikit_learn(mixture: OnlineMixture, x: Tensor) -> Callable[[], object] | None:
    """One iteration of fit; None where there are fewer rows than components, which scikit-learn refuses."""
    if len(x) < len(mixture.mean) or x.device.type != "cpu":
        return None
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    k, rows = len(mixture.mean), x.numpy()
    diagonal = mixture.covariance == "diagonal"
    model = GaussianMixture(
        k,
        covariance_type="diag" if diagonal else "spherical",
        max_iter=1,
        init_params="random",
        reg_covar=1e-4,
        weights_init=torch.full((k,), 1 / k).double().numpy(),
        means_init=mixture.mean.numpy(),
        precisions_init=(1 / mixture.variance).squeeze(-1).numpy(),
    )

    def fit() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(rows)

    return fit


def limit(k: int, n: int, covariance: str, device: torch.device) -> Callable[[], None]:
    """The work that cannot be left out, by chunks that stay in a cache, into memory that is used again."""
    depth, chunk = DIM * (2 if covariance == "diagonal" else 1), min(k, 1024)
    mean, features = torch.randn(k, depth, device=device), torch.randn(n, depth, device=device)
    scores, sums = torch.empty(chunk, n, device=device), torch.empty(chunk, depth, device=device)

    def work() -> None:
        for start in range(0, k, chunk):
            part = mean[start : start + chunk]
            torch.mm(part, features.T, out=scores)
            torch.exp(scores.mul_(0.01), out=scores)  # small ones: no exponential may overflow
            torch.mm(scores, features, out=sums)
            part.lerp_(sums, 0.0)

    return work


def rows(sizes: Sequence[int], device: torch.device) -> Iterator[Row]:
    for k in sizes:
        for n in BATCHES:
            for covariance in ("isotropic", "diagonal"):
                yield from _case(k, n, covariance, device)


def _case(k: int, n: int, covariance: str, device: torch.device) -> Iterator[Row]:
    x = clustered(n, 0, device)
    stream = itertools.cycle([clustered(n, seed, device) for seed in range(8)])  # a mixture fits one batch too well
    mixture = build(k, n, covariance, device)
    balanced = build(k, n, covariance, device, balance="sinkhorn")
    start = build(k, n, covariance, device)
    peer = scikit_learn(start, x)
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: mixture.observe(next(stream)),
        "balanced": lambda: balanced.observe(next(stream)),
        "dense": lambda: dense(start, x),
        "limit": limit(k, n, covariance, device),
    }
    notes = []
    if 4 * n * k * DIM <= MOST_BYTES // 3:  # it holds three such arrays
        functions["broadcast"] = lambda: broadcast(start, x)
    else:
        notes.append(f"broadcast needs {12 * n * k * DIM >> 30} GiB")
    if peer is not None:
        functions["scikit-learn"] = peer
    elif device.type == "cpu":
        notes.append("scikit-learn refuses fewer rows than components")
    costs = alternate(functions, repeats=5, most_seconds=6.0)
    others: dict[str, Cost | None] = {name: costs.get(name) for name in ("broadcast", "dense", "scikit-learn")}
    least, size = costs["limit"].seconds, f"K = {k:,}, B = {n:,}"
    counted = "two products, exp, means read and written"
    yield Row(
        f"mixture {covariance}",
        size,
        costs["ours"],
        least,
        counted,
        others,
        f"≤ {TARGETS[n]} × limit",
        costs["ours"].seconds <= TARGETS[n] * least,
        "; ".join(notes),
    )
    yield Row(f"mixture {covariance}, Sinkhorn", size, costs["balanced"], least, counted)


if __name__ == "__main__":
    main("mixture", rows)
