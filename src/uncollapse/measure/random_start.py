"""Whether prototypes still lie as a random start leaves them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 2048
_DRAWS = 6


@dataclass(frozen=True)
class RandomLikeness:
    """How a matrix compares with as many random directions; all ratios are 1 for those, up to sampling."""

    rows: int
    """Looked at: all, or 2,048 evenly spread ones."""
    resultant: float
    """rows × squared length of the mean direction."""
    spread: float
    """D × mean squared cosine of different rows."""
    nearest: float
    """Mean cosine to the nearest other row."""
    nearest_random: float
    """The same of random directions of this shape."""
    unique: float
    """Share of unique rows at the headline ε among as many random directions; below 1 where D is small."""
    orthogonal: bool
    """Whether rows (K ≤ D) or columns are orthogonal to 1e-3, as orthogonal initialisation makes them."""
    alike: bool | None
    """Whether it cannot be told from a random start; None where there are too few rows or dimensions to say."""

    @property
    def rule(self) -> str:
        if self.orthogonal:
            return "rows or columns are orthogonal to 0.001, as orthogonal initialisation leaves them"
        return (
            "looks like a random start: mean direction (rows × length²), spread (D × mean cos²) and mean cosine to "
            f"the nearest row are {self.resultant:.2f}, {self.spread:.3f} and {self.nearest:.3f}, for random "
            f"directions 1, 1 and {self.nearest_random:.3f}"
        )


def random_likeness(w: Tensor, eps: float) -> RandomLikeness:
    """Compares w (K, D; rows finite and not zero) with random directions of its shape, and of orthogonal ones.

    Any start in use (uniform or normal entries, any scale) has directions that are uniform or close to it:
    mean near 0, mean squared cosine 1/D, and nearest neighbours as far as chance has them. Training changes at
    least one of the three long before anything else shows: the mean by far first.
    """
    n, dim = min(len(w), _SAMPLE), w.shape[1]
    chosen = w[torch.linspace(0, len(w) - 1, n).long().to(w.device)].double()
    chosen = chosen / chosen.abs().amax(1, keepdim=True)
    shape = _shape_of(chosen)
    generator = torch.Generator().manual_seed(0)
    draws = [
        _shape_of(torch.randn(n, dim, generator=generator, dtype=torch.float64).to(w.device))
        for _ in range(_DRAWS if n > 1 else 0)
    ]
    if not draws:
        return RandomLikeness(n, *shape, shape[2], 1.0, False, None)
    expected = sum(d[2] for d in draws) / len(draws)
    noise = math.sqrt(sum((d[2] - expected) ** 2 for d in draws) / (len(draws) - 1))
    alike = None
    if n >= 32 and dim >= 4:  # with fewer, chance is too wide to be told from training
        alike = (
            shape[0] < 1.5 + 6 * math.sqrt(2 / dim)
            and abs(shape[1] - 1) < 0.1 + 6 * math.sqrt(4 / (n * (n - 1)))
            and abs(shape[2] - expected) < 0.02 + 6 * noise
        )
    orthogonal = n >= 8 and dim >= 4 and _is_orthogonal(w, chosen)
    return RandomLikeness(n, *shape, expected, random_share(len(w), dim, eps), orthogonal, orthogonal or alike)


def _is_orthogonal(w: Tensor, chosen: Tensor) -> bool:
    k, dim = w.shape
    if k <= dim:
        rows = torch.nn.functional.normalize(chosen, dim=1)
        return float((rows @ rows.T).fill_diagonal_(0).abs().max()) < 1e-3
    scale = w.abs().amax().double()
    gram = sum((part.double() / scale).T @ (part.double() / scale) for part in w.split(1 << 16))
    assert isinstance(gram, Tensor)
    gram = gram / (gram.trace() / dim)
    return float((gram - torch.eye(dim, dtype=gram.dtype, device=gram.device)).abs().max()) < 1e-3


def random_share(rows: int, dim: int, eps: float) -> float:
    """Share of unique rows among random directions, ``rows`` of them: 1 unless there are few dimensions or ε is wide.

    The chance that two random directions are closer than ε is that of a cap of the sphere, an incomplete beta function.
    Where a row has next to no other in its cap the share is 1; elsewhere it is counted on such a draw.
    """
    from scipy.special import betainc

    from uncollapse.measure.unique import greedy_cover

    if dim < 2 or rows < 2:
        return 1.0
    cap = 0.5 * float(betainc((dim - 1) / 2, 0.5, min(1.0, 1 - (1 - eps) ** 2)))
    if rows * (cap if eps <= 1 else 1 - cap) < 0.01:
        return 1.0
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    return len(greedy_cover(drawn, eps)) / rows


def _shape_of(x: Tensor) -> tuple[float, float, float]:
    n = len(x)
    x = torch.nn.functional.normalize(x, dim=1, eps=0.0)
    mean = float(x.mean(0).square().sum()) * n
    if n == 1:
        return mean, 1.0, 1.0
    cos = (x @ x.T).fill_diagonal_(0)
    spread = float(cos.square().sum()) / (n * (n - 1)) * x.shape[1]
    return mean, spread, float(cos.fill_diagonal_(-2).amax(1).mean())
