"""Rows of a matrix on the unit sphere, and which of them are closer than a threshold: float64 decides.

The bulk is done in float32, whose rounding is bounded; what is closer to the threshold than that bound is looked at
again in float64.
"""

import time

import numpy as np
import torch
from torch import Tensor

from uncollapse.numerics import NEAR, blocks, rounding, rows_at_once

TILE = 1024
"""Columns of a tile of cosines."""
_PREFIX_FROM = 4096  # below this the prefix bound costs more than it saves
_SAMPLE = 2048  # rows that give the basis; a quarter as many others choose the length
_REST = 2.0**-20
"""Added to the squared length of what a prefix leaves out, of which float32 rows tell no more."""


def tensor_of(w: Tensor | np.ndarray) -> Tensor:
    """A tensor as it is; an array of any byte order and strides as one."""
    if isinstance(w, Tensor):
        return w
    return torch.as_tensor(np.ascontiguousarray(w, dtype=w.dtype.newbyteorder("=")))


class Rows:
    """The rows of a matrix on the unit sphere, in float32, with what is needed to decide exactly."""

    def __init__(self, w: Tensor | np.ndarray, name: str = "w") -> None:
        w = tensor_of(w)
        if w.ndim != 2 or not w.is_floating_point() or 0 in w.shape:
            raise ValueError(
                f"{name} must be a non-empty floating (rows, dimensions) tensor, "
                f"got shape {tuple(w.shape)} and dtype {w.dtype}; pass one vector per row"
            )
        self.w = w.detach().cpu() if w.device.type == "mps" else w.detach()  # mps has no float64
        self.unit = torch.empty(self.w.shape, dtype=torch.float32, device=self.w.device)
        for chunk in self.chunks():
            _normalise_into(self.unit[chunk], self.w[chunk])
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
        return blocks(len(self.w), rows_at_once(self.w.shape[1], NEAR, 1))

    def double(self, i: Tensor) -> Tensor:
        return _normalised(self.w[i])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b.T in float32 whatever autocast says, valid until the next product.

        All products share their memory: the page faults of a fresh tile cost as much as the arithmetic.
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
        low, high = band(eps, self.slack)
        perhaps = cos >= low
        if not perhaps.any():
            return perhaps
        near = cos > high
        if np.count_nonzero(perhaps) > np.count_nonzero(near):
            a, b = np.divmod(np.flatnonzero(perhaps ^ near), near.shape[1])  # np.nonzero is far slower
            near[a, b] = self._closer(i.cpu()[a], j.cpu()[b], eps).numpy()
        return near

    def pairs_near(self, i: Tensor, j: Tensor, eps: float) -> Tensor:
        """Whether row i[n] is within eps of row j[n], (n,) bool on their device."""
        low, high = band(eps, self.slack)
        step = rows_at_once(self.w.shape[1], NEAR, 1)
        parts = [(self.unit[a] * self.unit[b]).sum(1) for a, b in zip(i.split(step), j.split(step), strict=True)]
        cos = torch.cat(parts)
        near = cos > high
        unsure = torch.nonzero((cos >= low) & ~near)[:, 0]
        if len(unsure):
            near[unsure] = self._closer(i[unsure].cpu(), j[unsure].cpu(), eps).to(near.device)
        return near

    def _closer(self, left: Tensor, right: Tensor, eps: float) -> Tensor:
        # On the CPU whatever the device, because the order of a sum is part of a float64 result.
        step = rows_at_once(self.w.shape[1], NEAR, 1)
        closer = torch.empty(len(left), dtype=torch.bool)
        for s in range(0, len(left), step):
            x = _normalised(self.w[left[s : s + step].to(self.w.device)].cpu())
            y = _normalised(self.w[right[s : s + step].to(self.w.device)].cpu())
            closer[s : s + step] = 1 - (x * y).sum(1) < eps
        return closer

    def prefix(self, eps: float) -> Tensor | None:
        """(K, m + 1) rows whose products bound the cosines from above, or None where that would not pay.

        In any orthonormal basis the cosine is at most the product over the first m coordinates plus the
        product of the lengths of what is left. The basis is the principal one of a sample, whose prefix holds
        the most; m is the one that leaves the least work on another sample.
        """
        dim, device = self.w.shape[1], self.w.device
        if len(self) < _PREFIX_FROM or dim > 1024:  # the basis costs D^3
            return None
        low = band(eps, self.slack)[0]
        with torch.autocast(device.type, enabled=False):
            every = max(2, len(self) // _SAMPLE)
            if self._basis is None:
                sample = self.unit[::every]
                self._basis = torch.linalg.eigh((sample.T @ sample).double())[1].flip(1)
            sample = self.unit[every // 2 :: 4 * every]  # of the others: the basis fits its own sample too well
            turned = sample @ self._basis.float()
            apart = (sample @ sample.T) < low
            best, chosen = 0.8, 0
            for m in (dim // 8, dim // 4, dim // 2):
                bound = _with_rest(turned[:, :m])
                missed = float(((bound @ bound.T >= low) & apart).sum()) / apart.numel()
                # A row is compared further where a tile holds one such pair; 0.1 is what reading a tile costs.
                cost = m / dim + min(1.0, missed * TILE) + 0.1
                if cost < best:
                    best, chosen = cost, m
        if not chosen:
            return None
        first = self._basis[:, :chosen].contiguous()
        out = torch.empty((len(self), chosen + 1), dtype=torch.float32, device=device)
        for chunk in self.chunks():
            out[chunk] = _with_rest(self.unit[chunk].double() @ first)
        return out


def _with_rest(first: Tensor) -> Tensor:
    """Appends what the first coordinates leave of a unit length, so that one product gives the bound."""
    rest = (1 - (first * first).sum(1, keepdim=True)).clamp_min_(0).add_(_REST).sqrt_()
    return torch.cat([first, rest], 1)


def _normalised(x: Tensor) -> Tensor:
    x = x.double()
    x = x / x.abs().amax(1, keepdim=True)  # first, so that squares neither overflow nor vanish
    return x / (x * x).sum(1, keepdim=True).sqrt()


def _normalise_into(out: Tensor, x: Tensor) -> None:
    """Unit rows in float32, each number at most 2**-23 of itself off; NaN for rows without a direction."""
    if x.dtype == torch.float64:
        out[:] = _normalised(x)
        return
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    torch.div(x, length.float(), out=out)
    odd = torch.nonzero(~((length > 1e-30) & (length < 1e30)))[:, 0]  # zero, NaN, or beyond float32
    if len(odd):
        out[odd] = _normalised(x[odd]).float()


def band(eps: float, slack: float) -> tuple[float, float]:
    """Cosines below the first are surely at least eps apart, above the second surely closer."""
    if not 0 < eps <= 2:
        raise ValueError(f"eps is a cosine distance, 1 - cos, and must lie in (0, 2], got {eps}")
    return 1 - eps - slack, 1 - eps + slack


def product_seconds(w: Tensor) -> float:
    """What half of the K × K product of w takes here in float32, from the time of one tile of it."""
    rows, columns = min(len(w), 1024), min(len(w), 4096)
    a, b = w[:rows].float(), w[:columns].float()
    out = torch.empty(rows, columns, device=w.device)
    best = float("inf")
    for _ in range(3):
        if w.device.type == "cuda":
            torch.cuda.synchronize(w.device)
        began = time.perf_counter()
        torch.mm(a, b.T, out=out)
        if w.device.type == "cuda":
            torch.cuda.synchronize(w.device)
        best = min(best, time.perf_counter() - began)
    return best * len(w) * len(w) / 2 / (rows * columns)
