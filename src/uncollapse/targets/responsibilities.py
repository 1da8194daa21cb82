"""Responsibilities of K components for n rows, in tiles: their balancing, and the sums over rows an M-step needs.

The log score of row i under component k is linear, ``φ(x_i) · η_k``, with features φ that end in a one and
parameters η that end in a constant: a Gaussian of any covariance is of that form, and so are cosine logits. The
E-step and the M-step are then one matrix product each, ``η φᵀ`` and ``Pᵀ φ``.

A tile holds some rows against all components, transposed ``(K, rows)`` so that a chunk of components is contiguous.
At least 64 rows share a tile, so at D = 256 it is no more than a quarter of the means themselves; where all rows
fit the budget there is one tile and nothing is computed twice. Scores become exponentials once; offsets found later
scale them (Sinkhorn in its scaling form) until they have grown enough to lose digits, and are then put back into the
exponent (log-domain stabilisation, Schmitzer 2019). No gradient passes through anything here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uncollapse.distributed import Group, logsumexp_over_ranks, max_over_ranks
from uncollapse.numerics import NEAR, blocks, rows_at_once

BUDGET = 1 << 28
"""Bytes of exponentials held at once."""

FLOOR = -64.0
"""Least exponent, relative to the row's largest. What lies below counts as e⁻⁶⁴, far beneath rounding: exponentials
and products of subnormal numbers take a CPU up to a hundred times as long as others."""

_FEWEST_ROWS = 64
_ALIGNED = 16
"""Columns of a product are padded to a multiple of this: the last few of 258 cost as much as 32 more would."""
_SHIFT = 12.0
"""Offsets that moved further go back into the exponent: what the floor hid until then is below e⁻⁴⁰ of its row. A new
batch moves them by 5 to 11 in three iterations, so that its scores are formed once."""
_STARVED = -40.0
"""A log mass below this, relative to the largest possible, is formed again in the log domain."""


@dataclass(frozen=True)
class Components:
    count: int
    parameters: Callable[[slice | Tensor], Tensor]
    """``(k, F)`` of those asked for, by slice or index. The caller may write to them, and so may the next call."""


class Tile(NamedTuple):
    """Some rows' responsibilities ``scale_k · weight_ki / total_i``."""

    rows: slice
    weight: Tensor
    """``(K, r)``, ``exp(score + offset - top)``."""
    scale: Tensor | None
    """``(K,)``; None where it is 1."""
    total: Tensor
    """``(r,)``"""
    top: Tensor
    """``(r,)``; the log normaliser is ``top + log total``."""


def chunks(count: int, width: int, device: torch.device) -> list[slice]:
    """Components of which ``width`` numbers each stay in a CPU's cache, or fill a GPU."""
    return blocks(count, rows_at_once(width, 4 * NEAR, device=device))


class Posterior:
    """Responsibilities of the components for rows of features, up to offsets that may change.

    Args:
        features: ``(n, F)`` float32 or float64, last column 1.
        components: with parameters of the same dtype.
        offset: ``(K,)`` added to the log scores.
        budget: bytes of exponentials held at once; more only where 64 rows need more.
        spare: memory to use for them, as an earlier posterior's ``spare``: on a CPU, fresh pages of a large array
            can cost as much as the product that fills them.
    """

    def __init__(
        self,
        features: Tensor,
        components: Components,
        offset: Tensor,
        budget: int = BUDGET,
        spare: Tensor | None = None,
    ) -> None:
        self.features, self.components, self.spare = features, components, spare
        self.base, self.shift = offset.clone(), torch.zeros_like(offset)
        n = len(features)
        most = max(_FEWEST_ROWS, budget // (features.element_size() * components.count))
        rows = max(1, -(-n // -(-n // most))) if n else 1
        self.parts = blocks(n, rows)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._moved = False

    @property
    def offset(self) -> Tensor:
        return self.base + self.shift

    def add(self, change: Tensor) -> None:
        """Adds ``change (K,)`` to the offsets."""
        self.shift += change
        self._moved = True

    def tiles(self) -> Iterator[Tile]:
        self._absorb()
        for rows in self.parts:
            weight, top, total = self._exponentials(rows) if self._kept is None else self._kept
            if len(self.parts) == 1:
                self._kept = weight, top, total
            scale = self.shift.exp() if self._moved else None
            if scale is not None:
                total = weight.T @ scale
            yield Tile(rows, weight, scale, total, top)

    def _absorb(self) -> None:
        """Puts the offsets' change into the exponent, where that costs nothing or digits ask for it."""
        if not self._moved:
            return
        if self._kept is not None:
            if float(self.shift.abs().amax()) <= _SHIFT:
                return
            self._kept = None
        self.base, self.shift, self._moved = self.offset, torch.zeros_like(self.shift), False

    def _exponentials(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Exponentials ``(K, r)``, the largest score ``(r,)`` taken off their exponents, and their sums ``(r,)``."""
        x = self.features[rows].T.contiguous()  # a product with a transpose is up to a quarter slower on a CPU
        numel = self.components.count * x.shape[1]
        spare = self.spare
        if spare is None or spare.numel() < numel or (spare.dtype, spare.device) != (x.dtype, x.device):
            self.spare = spare = x.new_empty(numel)
        weight = spare[:numel].view(-1, x.shape[1])
        top = x.new_full((x.shape[1],), -math.inf)
        parts = chunks(len(weight), sum(x.shape), x.device)
        for part in parts:
            eta = self.components.parameters(part)
            eta[:, -1] += self.base[part]
            torch.mm(eta, x, out=weight[part])
            torch.maximum(top, weight[part].amax(0), out=top)
        total = torch.zeros_like(top)
        for part in parts:
            total += weight[part].sub_(top).clamp_min_(FLOOR).exp_().sum(0)  # while the chunk is in cache
        return weight, top, total


def log_masses(
    posterior: Posterior, group: Group = None, raw: bool = False, exact: bool = False, row_weight: Tensor | None = None
) -> Tensor:
    """Log of the sum over rows of each component's responsibilities, ``(K,)``.

    Args:
        posterior: of this rank's rows.
        group: ranks whose rows are added up.
        raw: of ``exp(score + offset)`` itself, as before the first normalisation of the rows.
        exact: form masses near the floor again in the log domain, from the scores; without it, no mass is less
            than about e⁻⁶⁴.
        row_weight: ``(n,)`` ≥ 0, how many times each row counts.
    """
    log_mass = torch.full_like(posterior.base, -math.inf)
    highest = log_mass.new_full((), -math.inf if raw else 0.0)
    normalisers = [posterior.features.new_zeros(0)]
    scaled = False
    for tile in posterior.tiles():
        if raw:
            reference = tile.top.amax()
            row, normaliser = (tile.top - reference).exp(), torch.zeros_like(tile.top)
            row = row if row_weight is None else row * row_weight[tile.rows]
            highest = torch.maximum(highest, reference)
        else:
            reference, row = torch.zeros_like(highest), _per_total(tile, row_weight)
            normaliser = tile.top + tile.total.log()
        normalisers.append(normaliser)
        scaled = scaled or tile.scale is not None
        mass = tile.weight @ row
        log_mass = torch.logaddexp(log_mass, (mass if tile.scale is None else mass * tile.scale).log() + reference)
    log_mass = logsumexp_over_ranks(log_mass, group)
    if exact:
        least = _STARVED + (2 * _SHIFT if scaled else 0)  # a scale lifts what the floor hid
        starved = (log_mass < max_over_ranks(highest, group) + least).nonzero().squeeze(-1)
        step = rows_at_once(len(posterior.features), least=1)
        for start in range(0, len(starved), step):
            part = starved[start : start + step]
            eta = posterior.components.parameters(part)
            eta[:, -1] += posterior.offset[part]
            scores = eta @ posterior.features.T - torch.cat(normalisers)
            scores = scores if row_weight is None else scores + row_weight.log()
            log_mass[part] = logsumexp_over_ranks(scores.logsumexp(1), group)
    return log_mass


def sums(posterior: Posterior, row_weight: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The M-step's sums ``Σ_i w_i P_ik φ(x_i)``, ``(k, F)`` for chunks of components; the last column is the mass.

    By the time the first chunk comes, all scores have been formed, so the caller may overwrite the components. The
    next chunk may overwrite this one.

    Args:
        posterior: its kept exponentials are used.
        row_weight: ``(n,)`` ≥ 0, how many times each row counts.
    """
    total: Tensor | None = None
    for tile in posterior.tiles():
        scaled = posterior.features[tile.rows] * _per_total(tile, row_weight).unsqueeze(-1)
        if len(posterior.parts) == 1:
            width = scaled.shape[1]
            scaled = F.pad(scaled, (0, -width % _ALIGNED))
            parts = chunks(len(tile.weight), sum(scaled.shape), scaled.device)
            buffer = scaled.new_empty(parts[0].stop, scaled.shape[1])
            for part in parts:
                summed = torch.mm(tile.weight[part], scaled, out=buffer[: part.stop - part.start])[:, :width]
                yield part, summed if tile.scale is None else summed.mul_(tile.scale[part].unsqueeze(-1))
            return
        # Exponentials that are not kept have all offsets in the exponent: there is no scale.
        total = tile.weight @ scaled if total is None else total.addmm_(tile.weight, scaled)
    if total is not None:
        for part in chunks(len(total), total.shape[1], total.device):
            yield part, total[part]


def _per_total(tile: Tile, row_weight: Tensor | None) -> Tensor:
    """What turns a tile's exponentials into responsibilities, each row as many times as it counts."""
    return 1 / tile.total if row_weight is None else row_weight[tile.rows] / tile.total
