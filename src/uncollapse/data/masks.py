"""Which patches are hidden from the student, every random number keyed by (seed, step, position, view)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 10
ASPECT = (0.3, 1 / 0.3)
_STREAM = 1 << 20
"""Keeps the masks' generator apart from the views'."""
_DROP_STREAM = 1 << 21


def block_mask(
    rows: int, columns: int, count: float, random: np.random.Generator, least: int | None = None
) -> np.ndarray:
    """``(rows, columns)`` bool with at most ``count`` hidden patches, in rectangles (Bao et al. 2022, Algorithm 1).

    As iBOT's released code draws them: a block's area is uniform between ``(min(rows, columns) // 3)²`` and what is
    left, whichever of the two is larger, and its aspect ratio log-uniform in 0.3..1/0.3; it is taken where it hides at
    least one more patch and no more than are left, whether or not it overlaps another. Ten attempts at each block, and
    no further one once all have failed, which mostly leaves a few patches less hidden than asked for. ``least`` stands
    for the smallest area.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    hidden, least = 0, (min(rows, columns) // 3) ** 2 if least is None else least
    while hidden < count:
        left, placed = count - hidden, 0
        for _ in range(ATTEMPTS):
            area = least + (left - least) * random.random()
            aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, side = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
            block = mask[top : top + height, side : side + width]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                placed = new
                break
        if not placed:
            break
        hidden += placed
    return mask


def dropped_patches(patches: int, share: float, seed: int, step: int) -> Tensor:
    """``(patches,)`` bool, True for those that every image of this step is seen without: any ``share`` of them.

    As many are kept as MSN's released code keeps, ``⌊patches · (1 - share)⌋``.
    """
    random = np.random.default_rng([seed, step, _DROP_STREAM])
    dropped = torch.ones(patches, dtype=torch.bool)
    dropped[torch.from_numpy(random.permutation(patches))[: math.floor(patches * (1 - share))]] = False
    return dropped


def crop_masks(
    patches: int,
    views: int,
    share: float,
    ratio: tuple[float, float],
    seed: int,
    step: int,
    positions: list[int],
    evenly: int | None = None,
) -> Tensor:
    """``(views, n, patches)`` bool, True where hidden; the crops at ``positions`` of the whole batch.

    Each crop is masked with probability ``share``, and then hides a share of its patches uniform in ``ratio``. A crop's
    mask depends on (seed, step, position, view) alone.

    ``evenly``, the number of images in the whole batch, is DINOv2's way: ``share`` of all its crops, rounded down, is
    masked, and their ratios lie one in each of as many equal parts of ``ratio``; blocks may be as small as 4 patches.
    """
    side = math.isqrt(patches)
    masks = np.zeros((views, len(positions), side, side), dtype=bool)
    if evenly is not None:
        order = np.random.default_rng([seed, step, _STREAM]).permutation(views * evenly).reshape(views, -1)
        masked, (low, high) = int(views * evenly * share), ratio
    for view in range(views):
        for i, position in enumerate(positions):
            random = np.random.default_rng([seed, step, position, view, _STREAM])
            if evenly is None:
                if random.random() < share:
                    masks[view, i] = block_mask(side, side, patches * random.uniform(*ratio), random)
            elif (place := int(order[view, position])) < masked:
                hidden = low + (high - low) * (place + random.random()) / masked
                masks[view, i] = block_mask(side, side, int(patches * hidden), random, least=4)
    return torch.from_numpy(masks.reshape(views, len(positions), patches))


def visible_block(rows: int, columns: int, count: int, random: np.random.Generator) -> np.ndarray:
    """``(rows, columns)`` bool with exactly ``count`` *visible* (False) patches, in one rectangle that may wrap around.

    CAPI's inverse block mask (Darcet et al. 2025, Section 3.3), as its released code draws it: an aspect ratio
    log-uniform in 0.5..2, within what fits, sides rounded up and the surplus of the last row hidden; the whole rolled
    by any number of rows and columns.
    """
    mask = np.ones((rows, columns), dtype=bool)
    if not count:
        return mask
    low = max(math.log(0.5), math.log(count / columns**2))
    high = min(math.log(2), math.log(rows**2 / count))
    aspect = math.exp(random.uniform(low, high))
    height = min(rows, math.ceil(math.sqrt(count * aspect)))
    width = min(columns, math.ceil(math.sqrt(count / aspect)))
    top, side = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
    mask[top : top + height, side : side + width] = False
    mask.reshape(-1)[np.flatnonzero(~mask)[count:]] = True
    return np.roll(mask, (int(random.integers(rows)), int(random.integers(columns))), (0, 1))


def around_blocks(
    patches: int, views: int, hidden: float, predicted: float, seed: int, step: int, positions: list[int]
) -> tuple[Tensor, Tensor]:
    """Which patches are hidden around a `visible_block`, and which of these are to be predicted.

    Args:
        hidden: share of the patches, rounded down, and less than all of them.
        predicted: share of the hidden ones, rounded down, and at least one of them.

    Returns:
        Twice ``(views, n, patches)`` bool, as many True in each view; of the crops at ``positions`` of the whole batch,
        from (seed, step, position, view) alone.
    """
    side = math.isqrt(patches)
    count = min(patches - 1, max(1, int(patches * hidden)))
    to_predict = max(1, int(count * predicted))
    masks = np.zeros((2, views, len(positions), patches), dtype=bool)
    for view in range(views):
        for i, position in enumerate(positions):
            random = np.random.default_rng([seed, step, position, view, _STREAM])
            masks[0, view, i] = visible_block(side, side, patches - count, random).reshape(-1)
            masks[1, view, i, random.permutation(np.flatnonzero(masks[0, view, i]))[:to_predict]] = True
    both = torch.from_numpy(masks)
    return both[0], both[1]
