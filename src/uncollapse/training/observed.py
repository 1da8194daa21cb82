"""What a set of prototypes that learns from the teacher's projections, and its monitor, see of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from uncollapse.config.facts import views_assigned
from uncollapse.config.schema import Config
from uncollapse.methods.contract import At, Seen, at_most
from uncollapse.prototypes.sets import Prototypes


def observed(
    everyone: Seen, levels: list[str], prototypes: Prototypes, config: Config, at: At
) -> tuple[Tensor, float, Tensor | None]:
    """Rows of all ``levels`` that share a set, the share of training done, and how much each row counts.

    Levels count alike, and tokens together as much as the views that have targets: what the mixture's memory is
    counted in.
    """
    most = config.prototypes.patch_rows or (config.run.batch if prototypes.first_view else None)
    rows = [_rows(everyone, level, prototypes.first_view, most, at, prototypes.in_order) for level in levels]
    if len(levels) == 1 and everyone.z[levels[0]].ndim == 3:
        return rows[0], at.progress, None
    fair = views_assigned(config) * config.run.batch
    weights = [torch.full((len(r),), fair / max(1, len(r)), device=r.device) for r in rows]
    return torch.cat(rows), at.progress, torch.cat(weights)


def watched(everyone: Seen, level: str, config: Config, at: At) -> Tensor:
    """``(n, D)``: what `alive` is counted on: one row of each image's first view, or as many tokens or regions.

    More would make a prototype alive that few rows share, and cost as much as the loss at a large K.
    """
    return _rows(everyone, level, True, config.run.batch, at)


def _rows(everyone: Seen, level: str, first_view: bool, most: int | None, at: At, in_order: bool = False) -> Tensor:
    """``(n, D)``: all projections of a level, or the first view's; of tokens and regions at most so many, at random.

    The choice and its order are the same on any number of ranks; so is that of all tokens, ``in_order``.
    """
    z = everyone.z[level]
    rows = (z[0] if first_view and z.ndim > 2 else z).flatten(0, -2)
    if z.ndim == 2 and in_order and most is None:
        most = len(rows)
    if z.ndim == 3 or most is None:
        return rows
    return at_most(rows, everyone.key[level] if z.ndim == 2 else None, most, at)
