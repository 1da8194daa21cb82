"""KoLeo-Proto against a float64 brute force over all pairs, and the cases that break naive forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.diversity import koleo_proto, nearest_neighbours


def brute_force(w):
    rows = [(r / r.norm()) for r in w.double()]
    total = 0.0
    for i, a in enumerate(rows):
        nearest = min(float((a - b).norm()) for j, b in enumerate(rows) if j != i)
        total -= math.log(nearest)
    return total / len(rows)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 40), d=st.integers(2, 8), block=st.integers(1, 50))
def test_value_equals_brute_force_for_any_block(seed, k, d, block):
    w = 5 * torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    assert float(koleo_proto(w.double(), block=block)) == pytest.approx(brute_force(w), rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 30), block=st.integers(1, 40))
def test_neighbours_equal_the_full_matrix(seed, k, block):
    w = torch.nn.functional.normalize(torch.randn(k, 6, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)
    full = w @ w.T
    full.fill_diagonal_(-2)
    assert torch.equal(nearest_neighbours(w, block), full.argmax(1))


def test_gradient_equals_finite_differences():
    w = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(koleo_proto, (w,))


def test_descent_moves_neighbours_apart():
    w = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    w[1::2] = w[::2] + 0.01 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    w.requires_grad_()
    before = float(koleo_proto(w))
    for _ in range(20):
        (gradient,) = torch.autograd.grad(koleo_proto(w), w)
        w.data -= 0.05 * gradient
    assert float(koleo_proto(w)) < before - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_exact_duplicates_and_zero_rows_stay_finite(dtype):
    w = torch.randn(8, 4).to(dtype)
    w[3] = w[2]
    w[5] = 0
    w.requires_grad_()
    loss = koleo_proto(w)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(w.grad).all()


def test_length_of_rows_does_not_matter():
    w = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(20, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(koleo_proto(w), koleo_proto(w * scale))


def test_one_row_is_an_error():
    with pytest.raises(ValueError, match="K ≥ 2"):
        koleo_proto(torch.ones(1, 4))
