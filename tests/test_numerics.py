"""How many rows are worked on at once."""

import pytest
import torch

from uncollapse.numerics import IN_FLIGHT, NEAR, blocks, rows_at_once


@pytest.mark.parametrize(("columns", "numbers", "least"), [(1, NEAR, 1), (1000, IN_FLIGHT, 64), (10**7, IN_FLIGHT, 64)])
def test_a_block_holds_what_is_asked_but_never_fewer_rows(columns, numbers, least):
    rows = rows_at_once(columns, numbers, least)
    assert rows >= least
    assert rows == least or rows * columns <= numbers < (rows + 1) * columns
    assert rows_at_once(columns, numbers, least, torch.device("cuda")) >= rows
    assert rows_at_once(columns, numbers, least, torch.device("cpu")) == rows


def test_no_columns_count_as_one():
    assert rows_at_once(0, NEAR) == NEAR


@pytest.mark.parametrize(("count", "rows"), [(0, 3), (1, 3), (7, 3), (9, 3), (2, 100)])
def test_blocks_cover_every_row_once(count, rows):
    parts = blocks(count, rows)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(part.stop - part.start == rows for part in parts[:-1])
    assert all(0 < part.stop - part.start <= rows for part in parts)
