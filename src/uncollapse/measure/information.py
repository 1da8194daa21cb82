"""View information: what one view of an image tells about the prototype of another view, as a held-out lower bound.

With z₁, z₂ the projections of two views of an image and b₂ the prototype of the second (argmax of the raw cosine), it
bounds the mutual information I(z₁; b₂): neither dead, nor duplicated, nor meaningless prototypes raise that. For any
positive critic f that was made from other images,

    I(z₁; b₂) ≥ E[ log f(z₁, b₂) − log Σ_b p(b) f(z₁, b) ],

the bound of Barber & Agakov (2003) with q(b | z) ∝ p(b) f(z, b). Counting p on a sample that holds the scored pair
itself makes it the bound of InfoNCE (van den Oord et al. 2018; Poole et al. 2019), which is valid at every sample size.
Here log f is a function of the cosine between z and prototype b, and another one where b is z's own argmax: as bent as
the fitting images ask for, and one straight line, a softmax over cosines at some temperature, where they are few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.measure.unique import cosine_argmax
from uncollapse.numerics import blocks, rows_at_once

_CELLS = 2048
"""Of equal width over cosines from -1 to 1; the critic is a table over them."""
_KNOTS = 24
"""Where the critic's logarithm may bend, at quantiles of the cosines."""
_FIT_ROWS = 2048
"""Projections that the critic, some fifty numbers, is fitted on at most."""
_BEND = 0.1
"""Penalty on the critic's bends, as so many images are worth."""


@dataclass(frozen=True)
class ViewInformation:
    """A lower bound, in bits, on what a projection tells about the prototype of another view of the same image."""

    bits: float
    standard_error: float
    """Of ``bits``, over the scored images."""
    fitted_on: str
    """``other images``, or ``the other half`` of the same ones."""
    n_fit: int
    """Images that it was fitted on."""
    n: int
    """Images that were scored."""
    views: int
    of_image: Tensor = field(compare=False, repr=False)
    """``(n,)`` float64 on the CPU, with mean ``bits``. Two sets of prototypes are compared by their differences on the
    same images."""

    def to_json(self) -> dict[str, float | int | str]:
        """All but `of_image`."""
        names = ("bits", "standard_error", "fitted_on", "n_fit", "n", "views")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def view_information(z_views: Tensor, w: Tensor, z_fit: Tensor | None = None) -> ViewInformation:
    """Bits that one view's projection tells about the prototype of another view of the same image: a lower bound.

    In expectation it is never above the truth, for images drawn independently, whatever K, n and the number of views.
    It is below it by what the critic cannot express, and by about K / (2 (n + m) ln 2) bits for what n + m images do
    not tell about p. Where the fitting images use the prototypes in other shares than the scored ones, they count for
    less in p, as the likelihood of each scored image given all others decides.

    Args:
        z_views: ``(V, n, D)`` projections of V ≥ 2 views of the same n ≥ 2 images, which neither encoder nor prototypes
            were trained on. Of any norm but zero.
        w: ``(K, D)`` prototypes, of any norm but zero, on the same device.
        z_fit: ``(V', m, D)``, V' ≥ 2 views of other images, training images as a rule, on the same device. None: each
            half of the images is scored by what was fitted on the other half; n ≥ 4.

    Returns:
        `ViewInformation`. Works in blocks; no array of rows × K is kept.

    Raises:
        ValueError: shapes disagree, too few views or images, or a row that is zero, NaN or infinite.
    """
    _check(z_views, "z_views", w, 2 if z_fit is not None else 4)
    if z_fit is not None:
        _check(z_fit, "z_fit", w, 1)
    with torch.autocast(w.device.type, enabled=False):
        z = _unit(z_views)
        if z_fit is not None:
            share, n_fit, fitted_on = _share(z, w, _unit(z_fit), same=False), z_fit.shape[1], "other images"
        else:
            # Every other image, so that an order by class does not make the halves differ.
            share = z.new_empty(z.shape[1], dtype=torch.float64)
            for half in (0, 1):
                share[half::2] = _share(z[:, half::2], w, z[:, 1 - half :: 2], same=True)
            n_fit, fitted_on = z.shape[1] // 2, "the other half"
    share = share.cpu() / math.log(2)
    error = float(share.std()) / math.sqrt(len(share))
    return ViewInformation(float(share.mean()), error, fitted_on, n_fit, len(share), len(z), share)


def _share(z: Tensor, w: Tensor, z_fit: Tensor, same: bool) -> Tensor:
    """Each image's part ``(n,)`` of the bound, float64 and in nats; ``same``: both are halves of one set."""
    chosen, chosen_fit = (cosine_argmax(x.flatten(0, 1), w).view(x.shape[:2]) for x in (z, z_fit))
    used, place = torch.cat([chosen.flatten(), chosen_fit.flatten()]).unique(return_inverse=True)
    b, b_fit = place[: chosen.numel()].view(chosen.shape), place[chosen.numel() :].view(chosen_fit.shape)
    w = _unit(w[used])  # prototypes that nobody chose have no share in p
    counts, counts_fit = (torch.bincount(x.flatten(), minlength=len(w)).double() / len(x) for x in (b, b_fit))
    log_f = _critic(z_fit, b_fit, w, counts_fit / counts_fit.sum())
    images = z_fit.shape[1]
    worth = images if same else _worth(b, counts, counts_fit, images)
    p = counts + worth / images * counts_fit
    return _score(z, b, w, p / p.sum(), log_f)


def _worth(b: Tensor, counts: Tensor, counts_fit: Tensor, images: int) -> float:
    """As how many images the fitting ones count in p: all, unless the scored ones are clearly distributed otherwise.

    Args:
        b: ``(V, n)`` of the scored images. counts, counts_fit: ``(K,)``, a view counting 1 / V.
        images: that ``counts_fit`` is of.
    """
    n = b.shape[1]
    own = torch.stack([(b == view).double().mean(0) for view in b])  # an image must not predict its own prototypes
    options = [images / 2**k for k in range(12)]
    likely = [
        ((counts[b] - own + worth / images * counts_fit[b] + 1 / len(counts)) / (n + worth)).log().mean(0)
        for worth in options
    ]
    best = max(range(len(options)), key=lambda k: float(likely[k].mean()))
    for worth, likelihood in zip(options, likely, strict=True):
        gap = likely[best] - likelihood
        if float(gap.mean()) <= float(gap.std()) / math.sqrt(n):
            return worth
    return options[best]


def _score(z: Tensor, b: Tensor, w: Tensor, p: Tensor, log_f: Tensor) -> Tensor:
    """The bound's share of each image ``(n,)``, over all ordered pairs of its views; ``log_f (2, cells)``."""
    views, n, _ = z.shape
    top = float(log_f.max())
    f = (log_f - top).exp()
    mass = p.to(f)
    out = torch.empty(n, dtype=torch.float64, device=z.device)
    for part in blocks(n, rows_at_once(views * len(w), least=1)):
        cells = _cells(z[:, part], w)
        own_prototype = b[:, part, None]
        at_own = cells.gather(2, own_prototype)
        normaliser = f[1][cells] @ mass + ((f[0] - f[1])[at_own] * mass[own_prototype])[..., 0]
        # [v, i, u]: the cell of view v's projection and view u's prototype
        theirs = b[:, part].T.expand(views, -1, -1)
        pair = cells.gather(2, theirs)
        value = torch.where(theirs == own_prototype, log_f[0][pair], log_f[1][pair]).double()
        pairs = (value.sum((0, 2)) - value.diagonal(dim1=0, dim2=2).sum(1)) / (views * (views - 1))
        out[part] = pairs - normaliser.double().log().mean(0) - top
    return out


def _critic(z: Tensor, b: Tensor, w: Tensor, p: Tensor) -> Tensor:
    """The tables of log f ``(2, cells)``, at a projection's own argmax and elsewhere, that are best on these images."""
    views, m, _ = z.shape
    images = min(m, max(1, _FIT_ROWS // views))
    chosen_images = torch.randperm(m, generator=torch.Generator().manual_seed(0))[:images].to(z.device)
    z, b = z[:, chosen_images], b[:, chosen_images]
    mass = torch.zeros(views, images, _CELLS, device=z.device)  # of p in each cell, but for the own argmax
    own_cell = torch.empty_like(b)
    pairs = torch.zeros(2, _CELLS, dtype=torch.float64, device=z.device)
    share = p.float()
    for part in blocks(images, rows_at_once(views * len(w), least=1)):
        cells, own_prototype = _cells(z[:, part], w), b[:, part, None]
        weight = share.expand(cells.shape).scatter(2, own_prototype, 0.0)
        mass[:, part] = torch.zeros_like(mass[:, part]).scatter_add_(2, cells, weight)
        own_cell[:, part] = cells.gather(2, own_prototype)[..., 0]
        theirs = b[:, part].T.expand(views, -1, -1)
        pair, same = cells.gather(2, theirs), theirs == own_prototype
        other_view = ~torch.eye(views, dtype=torch.bool, device=z.device)[:, None].expand_as(same)
        for row, chosen in enumerate((same & other_view, ~same & other_view)):
            pairs[row] += torch.bincount(pair[chosen], minlength=_CELLS)
    own = own_cell.flatten().cpu(), share[b].flatten().cpu()
    table = _best_table(mass.flatten(0, 1).cpu(), *own, (pairs / pairs.sum()).cpu(), images)
    return table.to(z)


def _best_table(mass: Tensor, own_cell: Tensor, own_mass: Tensor, pairs: Tensor, images: int) -> Tensor:
    """Maximises the bound over log f ``(2, cells)``, piecewise linear, less a penalty on bends: a concave problem.

    Args:
        mass: ``(rows, cells)``. own_cell, own_mass: ``(rows,)``, of each row's own argmax.
        pairs: ``(2, cells)``, how the pairs of views are distributed; sums to 1.
        images: that the rows come from; the more, the less the penalty weighs.
    """
    everywhere = mass.mean(0, dtype=torch.float64)
    hats = [_hats(pairs[0]), _hats(pairs[1] + everywhere / everywhere.sum())]
    basis = torch.block_diag(*hats)
    bends = torch.block_diag(*(torch.eye(h.shape[1], dtype=basis.dtype).diff(n=2, dim=0) for h in hats))
    # The second term holds knots that no pair is near.
    penalty = 2 * _BEND / images * bends.T @ bends + 2e-6 * torch.eye(basis.shape[1], dtype=basis.dtype)
    target, thin, cells = basis.T @ pairs.flatten(), basis.float(), mass.shape[1]

    def evaluate(theta: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        table = basis @ theta
        f = (table - table.max()).exp().float()
        own = own_mass * f[own_cell]
        normaliser = (mass @ f[cells:] + own).clamp_min(torch.finfo(f.dtype).tiny)
        bound = theta @ target - normaliser.double().log().mean() - table.max()
        return float(bound - theta @ penalty @ theta / 2), f, own, normaliser

    theta = torch.zeros(basis.shape[1], dtype=basis.dtype)
    value, f, own, normaliser = evaluate(theta)
    for _ in range(50):  # Newton's method
        expected = mass @ (f[cells:, None] * thin[cells:]) + own[:, None] * thin[own_cell]
        expected = (expected / normaliser[:, None]).double()
        mean = torch.zeros(2 * cells, dtype=basis.dtype)
        mean[cells:] = f[cells:] * (mass.T @ (1 / normaliser)) / len(mass)
        mean.index_add_(0, own_cell, (own / normaliser).double() / len(mass))
        gradient = target - expected.mean(0) - penalty @ theta
        curvature = basis.T @ (mean[:, None] * basis) - expected.T @ expected / len(mass) + penalty
        step = torch.linalg.solve(curvature, gradient)
        length, gain = 1.0, float(gradient @ step)
        while (new := evaluate(theta + length * step))[0] < value + 1e-4 * length * gain and length > 1e-6:
            length /= 2
        if not new[0] > value + 1e-7:
            break
        theta = theta + length * step
        value, f, own, normaliser = new
    return (basis @ theta).view(2, cells)


def _hats(density: Tensor) -> Tensor:
    """Piecewise linear functions ``(cells, J)`` with knots at quantiles of a density over cells and at both ends."""
    cells = len(density)
    density = density if bool(density.sum() > 0) else torch.ones_like(density)
    share = density.cumsum(0) / density.sum()
    inner = torch.searchsorted(share, torch.linspace(0, 1, _KNOTS, dtype=share.dtype)[1:-1])
    knots = torch.cat([torch.tensor([0, cells // 2, cells - 1]), inner.clamp(0, cells - 1)]).unique()
    at = torch.arange(cells)
    right = torch.searchsorted(knots, at).clamp(1, len(knots) - 1)
    along = (at - knots[right - 1]).double() / (knots[right] - knots[right - 1])
    hats = torch.zeros(cells, len(knots), dtype=torch.float64)
    hats[at, right - 1], hats[at, right] = 1 - along, along
    return hats


def _cells(z: Tensor, w: Tensor) -> Tensor:
    """``(V, n, D)`` and ``(K, D)`` unit rows → the cell of each cosine, ``(V, n, K)`` int64."""
    return (z @ w.T).add_(1).mul_(_CELLS / 2).clamp_(0, _CELLS - 1).long()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().float(), dim=-1)


def _check(z: Tensor, name: str, w: Tensor, least: int) -> None:
    if z.ndim != 3 or w.ndim != 2 or z.shape[2] != w.shape[1] or not len(w):
        raise ValueError(
            f"need {name} (views, images, D) and prototypes (K, D), got {tuple(z.shape)} and {tuple(w.shape)}"
        )
    if len(z) < 2 or z.shape[1] < least:
        raise ValueError(
            f"{name} holds {len(z)} views of {z.shape[1]} images; view information needs at least 2 views of {least}"
        )
