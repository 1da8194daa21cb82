"""KoLeo-Proto against a float64 brute force over all pairs, and the cases that break naive forms."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.config.load import load_config
from uncollapse.config.tiny import tiny
from uncollapse.losses import koleo as diversity
from uncollapse.losses.koleo import koleo_proto, nearest_neighbours
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.run_folder.checkpoint import load_checkpoint
from uncollapse.training.run import train


def brute_force(w):
    rows = [(r / r.norm()) for r in w.double()]
    total = 0.0
    for i, a in enumerate(rows):
        nearest = min(float((a - b).norm()) for j, b in enumerate(rows) if j != i)
        total -= math.log(nearest)
    return total / len(rows)


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(w):
    """The definition with autograd and the K × K distances, in float64: value and gradient."""
    w = w.detach().double().requires_grad_()
    unit = w / w.norm(dim=1, keepdim=True)
    squared = (unit.unsqueeze(1) - unit).square().sum(-1) + 1e-16
    loss = -0.5 * (squared + torch.diag(torch.full((len(w),), 9.0))).amin(1).log().mean()
    return loss.detach(), torch.autograd.grad(loss, w)[0]


def near_duplicates(seed, modes, each, dim, spread):
    """Each row's nearest is closer to its rivals than a float32 cosine can tell."""
    w = rows(seed, modes, 1, dim) + spread * rows(seed + 1, modes, each, dim)
    return w.reshape(-1, dim)[torch.randperm(modes * each, generator=torch.Generator().manual_seed(seed))]


def exact_neighbours(w):
    unit = torch.nn.functional.normalize(w, dim=1).double()
    apart = torch.cat([(unit[i : i + 1] - unit).square().sum(1)[None] for i in range(len(w))])
    return apart.fill_diagonal_(9).argmin(1), apart


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 40), d=st.integers(2, 8), block=st.none() | st.integers(1, 50))
def test_value_equals_brute_force_for_any_block(seed, k, d, block):
    w = 5 * torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    assert float(koleo_proto(w.double(), block=block)) == pytest.approx(brute_force(w), rel=1e-6, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 30), block=st.none() | st.integers(1, 40))
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


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(3, 40), d=st.integers(2, 8), block=st.none() | st.integers(1, 50))
def test_value_and_gradient_equal_autograd_through_all_pairs(seed, k, d, block):
    """1e-9: only the order of sums differs; a tie of two neighbours within that has probability nil."""
    w = (3 * rows(seed, k, d)).double().requires_grad_()
    value = koleo_proto(w, block=block)
    expected, gradient = dense(w)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(2 * value, w)[0], 2 * gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("k", "d"), [(700, 32), (1300, 8)])
def test_float32_over_several_tiles(k, d):
    """Sizes that no tile divides; 1e-5 of the largest gradient is float32's rounding of the unit rows."""
    w = rows(0, k, d).requires_grad_()
    value = koleo_proto(w)
    (gradient,) = torch.autograd.grad(value, w)
    expected, exact = dense(w)
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([1e-2, 1e-4, 1e-6]), block=st.sampled_from([None, 7, 130]))
def test_near_ties_are_told_apart_in_float64(seed, spread, block):
    w = near_duplicates(seed, 5, 60, 24, spread)
    nearest, apart = exact_neighbours(w)
    found = nearest_neighbours(w, block)
    # Ties to 4e-15 in the cosine, 8e-15 in the squared distance.
    own = torch.arange(len(w))
    assert bool((apart[own, found] <= apart[own, nearest] + 1.6e-14).all())
    assert found.equal(nearest) or spread < 1e-5


def test_neighbours_do_not_depend_on_the_matrix_product_precision(monkeypatch):
    """With bf16 products asked for, and really made, a few per cent of the neighbours found would be wrong."""
    w = torch.cat([rows(0, 600, 64), near_duplicates(1, 4, 50, 64, 1e-3)])
    expected = nearest_neighbours(w)
    assert torch.equal(nearest_neighbours(w, 256), expected)

    def rounded(a, b, scratch):
        return a.bfloat16().float() @ b.bfloat16().float().T

    monkeypatch.setattr(diversity, "_product", rounded)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest_neighbours(w), expected)
        assert torch.equal(nearest_neighbours(w, 256), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    unit = torch.nn.functional.normalize(w, dim=1)
    plain = rounded(unit, unit, None).fill_diagonal_(-2).argmax(1)
    assert int((plain != expected).sum()) > 5  # the case is one


def test_exact_duplicates_are_found_lowest_index_first():
    w = rows(0, 40, 8)[torch.arange(400) % 40]
    expected = torch.where(torch.arange(400) < 40, torch.arange(400) + 40, torch.arange(400) % 40)
    assert torch.equal(nearest_neighbours(w), expected)
    assert torch.equal(nearest_neighbours(w, 17), expected)


def test_autocast_changes_nothing():
    w = rows(0, 300, 32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = koleo_proto(w)
    assert torch.equal(inside, koleo_proto(w))
    assert inside.dtype == torch.float32


def test_zero_rows_get_no_gradient_and_repel_nobody():
    w = rows(0, 12, 5).double()
    w[4] = 0
    w.requires_grad_()
    value = koleo_proto(w)
    (gradient,) = torch.autograd.grad(value, w)
    others = torch.arange(12) != 4
    expected, exact = dense(w[others])
    assert float(value.detach()) == pytest.approx(float(expected) * 11 / 12, rel=1e-9)  # its own distance is 1
    torch.testing.assert_close(gradient[others], exact * 11 / 12)
    assert not gradient[4].any()


def test_nan_is_not_swallowed():
    w = rows(0, 300, 5)
    w[7, 2] = torch.nan
    assert bool(koleo_proto(w).isnan())


def test_old_neighbours_serve_until_looked_for_again():
    w = rows(0, 200, 16).double()
    neighbours = nearest_neighbours(w)
    torch.testing.assert_close(koleo_proto(w, neighbours=neighbours), koleo_proto(w), rtol=0, atol=0)
    moved = (w + 0.3 * rows(1, 200, 16)).requires_grad_()
    unit = torch.nn.functional.normalize(moved, dim=1)
    expected = -((unit - unit[neighbours]).norm(dim=1)).log().mean()
    torch.testing.assert_close(koleo_proto(moved, neighbours=neighbours), expected)
    ours, exact = (torch.autograd.grad(x, moved)[0] for x in (koleo_proto(moved, neighbours=neighbours), expected))
    torch.testing.assert_close(ours, exact)
    for wrong in (neighbours[:-1], neighbours.int()):
        with pytest.raises(ValueError, match="one per row of w"):
            koleo_proto(w, neighbours=wrong)


def steps(prototypes, n):
    optimizer = torch.optim.SGD([prototypes.student_v], lr=20.0)
    for _ in range(n):
        optimizer.zero_grad()
        prototypes.regulariser().backward()
        optimizer.step()
        prototypes.after_step()


def test_refreshing_every_n_steps(monkeypatch):
    searches = []
    plain = diversity._search
    monkeypatch.setattr(diversity, "_search", lambda *a: searches.append(1) or plain(*a))

    def fresh(every):
        return JointPrototypes(50, 8, True, 0.1, torch.Generator().manual_seed(0), every)

    every, rare = fresh(1), fresh(4)
    assert "neighbours" not in every.state_dict()
    steps(every, 9)
    assert len(searches) == 9
    steps(rare, 9)
    assert len(searches) == 9 + 3
    first, second = fresh(4), fresh(4)
    steps(first, 6)
    second.load_state_dict(first.state_dict())
    steps(second, 3)
    assert torch.equal(second.student_v, rare.student_v)
    assert torch.equal(second.neighbours, rare.neighbours)


def test_resume_between_two_searches_reaches_the_same_bits(tmp_path):
    config = tiny(load_config("demo", {"prototypes.kind": "koleo", "prototypes.koleo_every": 4}))

    def run(name, stop, resume=False):
        train(config, tmp_path / name, stop, resume, say=lambda line: None, accelerator="cpu")
        return load_checkpoint(Path(tmp_path / name) / "checkpoints")["prototypes"]["cls"]

    whole = run("whole", 7)
    run("parts", 2)
    parts = run("parts", 7, resume=True)
    assert whole.keys() == parts.keys() >= {"neighbours", "neighbours_age"}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
