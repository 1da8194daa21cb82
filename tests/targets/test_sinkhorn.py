"""Sinkhorn without a dense matrix against the textbook's matrix scaling in float64, alone and over ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ranks import on_ranks
from uncollapse.targets.prior import power_law
from uncollapse.targets.sinkhorn import sinkhorn, sinkhorn_offsets

TILED = 1  # bytes: the smallest tiles there are


def case(n, k, d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1)
    w = F.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=-1)
    return z.to(dtype), w.to(dtype)


def scaling(scores, iterations):
    """The loop of SwAV, DINOv2 and MSN, with their factors."""
    q = (scores - scores.max()).exp().T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / n
    return (q * n).T


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    k=st.integers(1, 70),
    seed=st.integers(0, 99),
    iterations=st.integers(1, 6),
    temperature=st.floats(0.03, 2),
    budget=st.sampled_from([TILED, 1 << 28]),
    biased=st.booleans(),
)
def test_offsets_equal_the_published_loop_in_float64(n, k, seed, iterations, temperature, budget, biased):
    z, w = case(n, k, seed=seed)
    bias = torch.linspace(-1, 2, k, dtype=torch.float64) if biased else None
    logits = z @ w.T / temperature + (0 if bias is None else bias)
    offsets = sinkhorn_offsets(z, w, temperature, iterations, bias, budget=budget)
    torch.testing.assert_close(torch.softmax(logits + offsets, 1), scaling(logits, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sinkhorn(logits, iterations), scaling(logits, iterations), rtol=1e-9, atol=1e-12)
    assert abs(float(offsets.mean())) < 1e-9


@pytest.mark.parametrize("budget", [TILED, 1 << 28])
def test_float32_is_as_good_as_float64_at_the_usual_temperatures(budget):
    z, w = case(256, 100)
    for temperature in (0.04, 0.07):
        narrow = sinkhorn_offsets(z.float(), w.float(), temperature, budget=budget)
        torch.testing.assert_close(narrow.double(), sinkhorn_offsets(z, w, temperature), rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [TILED, 1 << 28])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 9), (3, 50), (130, 4)])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_agree_with_the_dense_log_domain(n, k, size, budget):
    """Up to ±1e4, where every exponential but one of a row is 0 in either float type."""
    g = torch.Generator().manual_seed(n)
    z, w = torch.randn(n, 5, generator=g).double(), torch.randn(k, 5, generator=g).double()
    temperature = float((z @ w.T).abs().max()) / size
    logits = z @ w.T / temperature
    offsets = sinkhorn_offsets(z, w, temperature, budget=budget)
    assert offsets.isfinite().all()
    torch.testing.assert_close(torch.softmax(logits + offsets, 1), sinkhorn(logits), rtol=1e-6, atol=1e-9)
    assert sinkhorn_offsets(z.float(), w.float(), temperature, budget=budget).isfinite().all()


@pytest.mark.parametrize("budget", [TILED, 1 << 28])
def test_columns_without_mass(budget):
    """One out of float32's reach gets its share all the same; one at minus infinity gets nothing, and harms no one."""
    z, w = case(100, 10, dtype=torch.float32)
    far, never = torch.zeros(10), torch.zeros(10)
    far[3], never[3] = -1e4, -torch.inf
    logits = z @ w.T / 0.1
    offsets = sinkhorn_offsets(z, w, 0.1, bias=far, budget=budget)
    found = torch.softmax(logits + far + offsets, 1)
    torch.testing.assert_close(found, sinkhorn(logits), rtol=0, atol=2e-3)  # an ulp of 1e4 is 1e-3
    offsets = sinkhorn_offsets(z, w, 0.1, bias=never, budget=budget)
    assert offsets.isfinite().all()
    others = [k for k in range(10) if k != 3]
    found = torch.softmax(logits + never + offsets, 1)
    torch.testing.assert_close(found[:, others], sinkhorn(logits[:, others]), rtol=1e-4, atol=1e-6)
    assert float(found[:, 3].max()) == 0 == float(sinkhorn(logits + never)[:, 3].max())


def test_masses_tend_to_equal_ones():
    z, w = case(200, 10)
    mass = torch.softmax(z @ w.T / 0.1 + sinkhorn_offsets(z, w, 0.1, iterations=60), 1).sum(0)
    torch.testing.assert_close(mass, torch.full_like(mass, 20.0), rtol=1e-6, atol=0)


def test_bfloat16_is_widened_and_autocast_ignored():
    z, w = case(50, 12, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sinkhorn_offsets(z, w, 0.05)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sinkhorn_offsets(z.float(), w.float(), 0.05))


@pytest.mark.parametrize(("iterations", "temperature"), [(0, 0.1), (3, 0.0), (3, float("nan"))])
def test_senseless_arguments_are_refused(iterations, temperature):
    with pytest.raises(ValueError, match=r"at least one iteration, got 0|temperature must be above 0"):
        sinkhorn_offsets(*case(4, 3), temperature, iterations)


def in_parts(everyone):
    rank, world = dist.get_rank(everyone), dist.get_world_size(everyone)
    z, w = case(203, 23)
    bias = torch.linspace(-1, 2, 23).double()
    mine = slice(203 * rank // world, 203 * (rank + 1) // world)
    return [
        sinkhorn_offsets(z[mine], w, temperature, 3, bias, group=everyone, budget=budget)
        for budget in (TILED, 1 << 28)
        for temperature in (0.05, 1e-4)
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_rows_split_over_ranks_are_one_process(world, tmp_path):
    offsets = on_ranks(in_parts, world, tmp_path)
    z, w = case(203, 23)
    bias = torch.linspace(-1, 2, 23).double()
    for i, temperature in enumerate([0.05, 1e-4, 0.05, 1e-4]):
        alone = sinkhorn_offsets(z, w, temperature, 3, bias)
        for rank in offsets:
            torch.testing.assert_close(rank[i], alone, rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 100),
    k=st.integers(1, 40),
    seed=st.integers(0, 99),
    exponent=st.floats(0, 2),
    budget=st.sampled_from([TILED, 1 << 28]),
    probabilities=st.booleans(),
)
def test_shares_of_the_prototypes_are_those_asked_for(n, k, seed, exponent, budget, probabilities):
    """The published loop with another column mass; over logits, or over probabilities as MSN has it."""
    z, w = case(n, k, seed=seed)
    shares = power_law(k, exponent, like=z)
    q = (z @ w.T / 0.1).exp()
    if probabilities:
        q = q / q.sum(1, keepdim=True)
    for _ in range(3):
        q = q / q.sum(0, keepdim=True) * shares
        q = q / q.sum(1, keepdim=True)
    keys = {"budget": budget, "marginal": shares, "of_probabilities": probabilities}
    found = torch.softmax(z @ w.T / 0.1 + sinkhorn_offsets(z, w, 0.1, 3, **keys), 1)
    torch.testing.assert_close(found, q, rtol=1e-9, atol=1e-12)
    start = torch.log_softmax(z @ w.T / 0.1, 1) if probabilities else z @ w.T / 0.1
    torch.testing.assert_close(sinkhorn(start, 3, shares), q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0])
def test_masses_tend_to_the_power_law(exponent):
    z, w = case(400, 10)
    shares = torch.tensor([(k + 1) ** -exponent for k in range(10)]).double()
    shares /= shares.sum()
    torch.testing.assert_close(power_law(10, exponent, like=z), shares)
    offsets = sinkhorn_offsets(z, w, 0.1, iterations=60, marginal=shares)
    torch.testing.assert_close(torch.softmax(z @ w.T / 0.1 + offsets, 1).mean(0), shares, rtol=1e-6, atol=0)


def test_msns_sinkhorn_is_this_one_over_probabilities():
    """Sharpened probabilities are a softmax at a lower temperature; what that divides each row by only matters first.

    Sinkhorn over logits tends to the same, so that after many iterations no start can be told from the other.
    """
    z, w = case(50, 12)
    p = torch.softmax(z @ w.T / 0.1, 1) ** (1 / 0.25)
    p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(p, torch.softmax(z @ w.T / 0.025, 1))

    def balanced(iterations, of_probabilities):
        offsets = sinkhorn_offsets(z, w, 0.025, iterations, of_probabilities=of_probabilities)
        return torch.softmax(z @ w.T / 0.025 + offsets, 1)

    torch.testing.assert_close(balanced(3, True), scaling(p.log(), 3), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(balanced(3, False), scaling(z @ w.T / 0.025, 3), rtol=1e-9, atol=1e-12)
    assert (balanced(3, True) - balanced(3, False)).abs().max() > 1e-3
    torch.testing.assert_close(balanced(3000, True), balanced(3000, False), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shares", [torch.ones(3), torch.tensor([0.5, 0.5, 0.0, 0.0])])
def test_shares_that_do_not_fit_are_refused(shares):
    for balance in (
        lambda: sinkhorn(torch.zeros(5, 4), 3, shares),
        lambda: sinkhorn_offsets(*case(5, 4), marginal=shares, temperature=0.1),
    ):
        with pytest.raises(ValueError, match="marginal"):
            balance()


@pytest.mark.parametrize(("count", "exponent"), [(0, 0.25), (4, -0.1), (4, float("nan"))])
def test_a_power_law_that_does_not_exist_is_refused(count, exponent):
    with pytest.raises(ValueError, match="power law"):
        power_law(count, exponent)
