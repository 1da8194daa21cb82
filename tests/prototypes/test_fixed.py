"""The control's two starts."""

import pytest
import torch

from uncollapse.config.load import load_config
from uncollapse.errors import ConfigError
from uncollapse.prototypes.build import initial_prototypes
from uncollapse.prototypes.sets import FixedPrototypes

KEYS = {"prototypes.kind": "fixed", "prototypes.start": "simplex", "head.bottleneck": 16}


@pytest.mark.parametrize("count", [2, 9, 17])
def test_corners_of_a_simplex_are_as_far_apart_as_can_be_and_sum_to_nothing(count):
    w = FixedPrototypes(count, 16, torch.Generator().manual_seed(0), "simplex").weight.double()
    expected = torch.full((count, count), -1 / (count - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(w @ w.T, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(w.sum(0), torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-5)
    other = FixedPrototypes(count, 16, torch.Generator().manual_seed(1), "simplex").weight
    assert (w - other).abs().max() > 0.1


def test_a_recipe_asks_for_a_simplex_and_more_corners_than_there_are_is_refused():
    w = initial_prototypes(load_config("demo", {**KEYS, "prototypes.count": 17})).vectors("teacher")
    assert (w @ w.T).fill_diagonal_(-1).max() < -0.05
    with pytest.raises(ConfigError, match=r"prototypes.start: a simplex in head.bottleneck = 16 dimensions .*not 18$"):
        load_config("demo", {**KEYS, "prototypes.count": 18})
