"""The linear probe's grid on made-up features whose best classifier is known."""

import numpy as np
import pytest
import torch

from gaussian_classes import task
from uncollapse.measure.linear import linear_probe, steps_for


def accuracy(x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, t: torch.Tensor) -> float:
    return float((linear_probe(x, y, test).scores.argmax(1) == t).double().mean())


def test_nears_the_bayes_rate_and_ignores_scale() -> None:
    x, y = task(1500, 4, 2, 1.0, 4, gap=0.8)
    test, t = task(2000, 4, 2, 1.0, 5, gap=0.8)
    centres = 0.8 * torch.randn(2, 4, generator=torch.Generator().manual_seed(99))
    bayes = float((torch.cdist(test, centres).argmin(1) == t).double().mean())
    assert 0.6 < bayes < 0.99
    assert accuracy(x, y, test, t) == pytest.approx(bayes, abs=0.02)
    scale = torch.tensor([1e-3, 1.0, 1e3, 50.0])
    assert accuracy(x * scale + 7, y, test * scale + 7, t) == pytest.approx(bayes, abs=0.02)


def test_the_choice_is_that_of_the_table_and_repeats() -> None:
    x, y = task(300, 20, 3, 3.0, 6)
    test, _ = task(50, 20, 3, 3.0, 7)
    wide = torch.cat([torch.randn(300, 20, generator=torch.Generator().manual_seed(1)), x], 1)
    inputs = (slice(0, 20), slice(20, 40))
    first, second = (linear_probe(wide, y, torch.cat([test, test], 1), inputs=inputs, seed=3) for _ in range(2))
    assert first.input == 1, "the first twenty columns are noise"
    assert (first.input, first.rate) == max(first.table, key=lambda row: (row[2], -row[3]))[:2]
    assert torch.equal(first.scores, second.scores)


def test_odd_classes() -> None:
    x, y = task(200, 5, 3, 0.3, 8, gap=3.0)
    y[0], x[0] = 7, 50.0  # one example of its class: must be fitted on, cannot be held out
    test, t = torch.cat([x[:1], x[1:10], x[1:2]]), torch.cat([y[:1], y[1:10], torch.tensor([12])])
    assert accuracy(x, y, test, t) == pytest.approx(10 / 11)
    with pytest.raises(ValueError, match="one class"):
        linear_probe(x, torch.zeros(200, dtype=torch.long), x)
    with pytest.raises(ValueError, match="one of each leaves none"):
        linear_probe(x, torch.arange(200), x)


def test_small_sets_get_a_hundred_epochs_and_large_ones_ten() -> None:
    assert steps_for(100) == (100, 100)
    assert steps_for(2560) == (256, 1000)
    assert steps_for(10_000) == (256, 1000)
    assert steps_for(50_000) == (256, int(np.ceil(10 * 50_000 / 256)))
    assert steps_for(1_000_000) == (1024, int(np.ceil(10_000_000 / 1024)))
