"""Masks: their rules, and their distribution beside the released code of iBOT and CAPI."""

import math

import numpy as np
import pytest
import torch

from uncollapse.data.masks import around_blocks, block_mask, crop_masks, dropped_patches, visible_block

MEASURED = [
    (14, 0.12, 0.1091, 0.0002, 1.226),
    (14, 0.3, 0.2922, 0.0001, 1.346),
    (14, 0.5, 0.4976, 0.0001, 1.289),
    (8, 0.3, 0.2958, 0.0001, 1.676),
    (6, 0.12, 0.1078, 0.0002, 1.140),
]
"""(side, share asked for, share hidden, its standard error, connected regions): 4,000 masks of the authors' loader."""


def regions(mask):
    """How many pieces the hidden patches make that touch side by side."""
    left, found = {tuple(at) for at in np.argwhere(mask).tolist()}, 0
    while left:
        found, queue = found + 1, [left.pop()]
        while queue:
            row, column = queue.pop()
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            queue += near
    return found


@pytest.mark.parametrize(("side", "share", "hidden", "error", "pieces"), MEASURED)
def test_masks_are_distributed_as_the_authors_are(side, share, hidden, error, pieces):
    random = np.random.default_rng(0)
    masks = np.stack([block_mask(side, side, share * side * side, random) for _ in range(1000)])
    shares = masks.mean((1, 2))
    assert abs(shares.mean() - hidden) < 4 * (error + shares.std() / 1000**0.5)
    counted = np.array([regions(mask) for mask in masks])
    assert abs(counted.mean() - pieces) < 5 * counted.std() / 1000**0.5


@pytest.mark.parametrize("count", [0, 0.9, 3, 16, 31.4, 98])
def test_no_more_is_hidden_than_asked_for(count):
    random = np.random.default_rng(1)
    masks = [block_mask(14, 14, count, random) for _ in range(200)]
    assert max(mask.sum() for mask in masks) <= count
    assert np.mean([mask.sum() for mask in masks]) >= 0.4 * int(count)


def test_half_the_crops_are_masked_and_their_shares_are_spread_between_the_two():
    masks = crop_masks(196, 2, 0.5, (0.1, 0.5), 0, 7, list(range(1000)))
    assert masks.shape == (2, 1000, 196)
    assert masks.dtype == torch.bool
    shares = masks.float().mean(-1)
    hidden = shares[shares > 0]
    assert abs(len(hidden) / 2000 - 0.5) < 0.04
    assert 0.05 < hidden.min() < 0.12
    assert 0.46 < hidden.max() <= 0.5
    assert abs(hidden.mean() - 0.2936) < 0.01  # 4,000 of the authors' masks: .1476 in all, .498 of them empty


def test_a_crops_mask_depends_on_seed_step_position_and_view_alone():
    whole = crop_masks(36, 2, 1.0, (0.2, 0.5), 3, 5, list(range(8)))
    assert torch.equal(crop_masks(36, 2, 1.0, (0.2, 0.5), 3, 5, [6, 2]), whole[:, [6, 2]])
    assert not torch.equal(whole[0], whole[1])
    for seed, step in ((4, 5), (3, 6)):
        assert not torch.equal(crop_masks(36, 2, 1.0, (0.2, 0.5), seed, step, list(range(8))), whole)


def test_dropped_patches_are_any_of_them_as_many_as_msn_drops():
    masks = torch.stack([dropped_patches(196, 0.15, 3, step) for step in range(2000)])
    assert (masks.sum(1) == 196 - 166).all()
    assert torch.equal(masks[5], dropped_patches(196, 0.15, 3, 5))
    assert not torch.equal(masks[5], dropped_patches(196, 0.15, 4, 5))
    often, error = masks.double().mean(0), (0.153 * 0.847 / 2000) ** 0.5
    assert (often - 30 / 196).abs().max() < 5 * error
    together = (masks[:, :-1] & masks[:, 1:]).double().mean()  # neighbours no more than any two
    assert abs(together - 30 / 196 * 29 / 195) < 5 * 0.15 / (2000 * 195) ** 0.5


AROUND = [
    (16, 166, 9.550, 0.029, 10.178, 0.031),
    (8, 41, 4.809, 0.013, 5.369, 0.016),
    (4, 10, 2.197, 0.006, 3.014, 0.010),
]
"""(side, hidden patches, rows and columns with a visible one, each with its standard error): 4,000 masks of CAPI's."""


@pytest.mark.parametrize(("side", "hidden", "rows", "rows_error", "columns", "columns_error"), AROUND)
def test_visible_blocks_are_distributed_as_the_authors_are(side, hidden, rows, rows_error, columns, columns_error):
    random, n = np.random.default_rng(0), 2000
    visible = ~np.stack([visible_block(side, side, side * side - hidden, random) for _ in range(n)])
    assert (visible.sum((1, 2)) == side * side - hidden).all()
    for axis, mean, error in ((2, rows, rows_error), (1, columns, columns_error)):
        counted = visible.any(axis).sum(1)
        assert abs(counted.mean() - mean) < 4 * math.hypot(error, counted.std() / n**0.5)
    everywhere = visible.mean(0)  # rolled: no place is visible more often than another
    assert abs(everywhere - everywhere.mean()).max() < 5 * (everywhere.mean() / n) ** 0.5


def test_a_visible_block_is_a_rectangle_that_may_wrap_around():
    """Rolled back, it is all of some rows of it and part of the last."""
    random = np.random.default_rng(1)
    for _ in range(200):
        visible = ~visible_block(8, 8, 23, random)
        block = np.zeros((8, 8), dtype=bool)
        block[: visible.any(1).sum(), : visible.any(0).sum()] = True
        block.reshape(-1)[np.flatnonzero(block)[23:]] = False
        assert any(np.array_equal(np.roll(block, (i, j), (0, 1)), visible) for i in range(8) for j in range(8))
        assert 0.4 < visible.any(1).sum() / visible.any(0).sum() < 2.5


@pytest.mark.parametrize(
    ("patches", "share", "hidden", "read"), [(256, 0.65, 166, 8), (16, 0.65, 10, 1), (4, 1.0, 3, 1)]
)
def test_as_many_patches_are_predicted_in_every_view_all_of_them_hidden(patches, share, hidden, read):
    masks, predicted = around_blocks(patches, 2, share, 0.05, 0, 3, list(range(20)))
    assert set(masks.sum(-1).flatten().tolist()) == {hidden}
    assert set(predicted.sum(-1).flatten().tolist()) == {read}
    assert not (predicted & ~masks).any()


def test_blocks_depend_on_seed_step_position_and_view_alone():
    whole = around_blocks(64, 2, 0.65, 0.1, 3, 5, list(range(8)))
    for one, part in zip(whole, around_blocks(64, 2, 0.65, 0.1, 3, 5, [6, 2]), strict=True):
        assert torch.equal(part, one[:, [6, 2]])
        assert not torch.equal(one[0], one[1])
    assert not torch.equal(around_blocks(64, 2, 0.65, 0.1, 3, 6, list(range(8)))[0], whole[0])
