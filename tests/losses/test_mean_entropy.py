"""ME-MAX against its definition in float64, alone and over ranks."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.losses import mean_entropy as module
from uncollapse.losses.mean_entropy import me_max, prediction_entropy
from uncollapse.targets.prior import power_law


def plain(z, w, temperature, bias=None):
    logits = z @ w.T / temperature
    mean = torch.softmax(logits if bias is None else logits + bias, dim=-1).mean(0)
    return math.log(len(w)) + (mean * mean.log()).sum()


def plain_divergence(z, w, temperature, prior):
    mean = torch.softmax(z @ w.T / temperature, dim=-1).mean(0)
    return (mean * (mean / prior).log()).sum()


def projections(n, k, d=8, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    z, w = torch.randn(n, d, generator=rng, dtype=dtype), torch.randn(k, d, generator=rng, dtype=dtype)
    return F.normalize(z, dim=-1).requires_grad_(), F.normalize(w, dim=-1).requires_grad_()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 200), k=st.integers(2, 40), seed=st.integers(0, 99), temperature=st.floats(0.05, 2.0))
def test_value_and_gradients_are_those_of_the_definition(n, k, seed, temperature):
    z, w = projections(n, k, seed=seed)
    bias = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, expected = me_max(z, w, temperature, bias), plain(z, w, temperature, bias)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * value, (z, w)), torch.autograd.grad(3 * expected, (z, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 200), k=st.integers(2, 40), seed=st.integers(0, 99), exponent=st.floats(0.0, 2.0))
def test_with_a_prior_it_is_the_divergence_from_it(n, k, seed, exponent):
    z, w = projections(n, k, seed=seed)
    prior = power_law(k, exponent, like=w)
    value, expected = me_max(z, w, 0.2, prior=prior), plain_divergence(z, w, 0.2, prior)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * value, (z, w)), torch.autograd.grad(3 * expected, (z, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(me_max(z, w, 0.2, prior=torch.full_like(prior, 1 / k)), me_max(z, w, 0.2))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 200), k=st.integers(2, 40), seed=st.integers(0, 99), temperature=st.floats(0.02, 2.0))
def test_the_entropy_of_each_prediction(n, k, seed, temperature):
    z, w = projections(n, k, seed=seed)
    bias = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = prediction_entropy(z, w, temperature, bias)
    p = torch.softmax(z @ w.T / temperature + bias, dim=-1)
    expected = -torch.special.xlogy(p, p).sum(1).mean()
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * value, (z, w)), torch.autograd.grad(3 * expected, (z, w)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_blocks_change_nothing(monkeypatch):
    z, w = projections(500, 30)
    whole = torch.autograd.grad(me_max(z, w, 0.1), (z, w))
    sure = torch.autograd.grad(prediction_entropy(z, w, 0.1), (z, w))
    monkeypatch.setattr(module, "rows_at_once", lambda *_, **__: 64)
    for a, b in zip(whole, torch.autograd.grad(me_max(z, w, 0.1), (z, w)), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(sure, torch.autograd.grad(prediction_entropy(z, w, 0.1), (z, w)), strict=True):
        torch.testing.assert_close(a, b)


def test_extremes_are_finite():
    z, w = projections(4, 3)
    assert me_max(torch.zeros_like(z), w, 0.1).item() == pytest.approx(0.0, abs=1e-12)
    same = z[:1].expand(4, -1).detach().requires_grad_()
    value = me_max(same, w, 1e-3)  # one prototype takes all: the others' share underflows
    assert value.item() == pytest.approx(math.log(3), rel=1e-6)
    assert torch.autograd.grad(value, same)[0].isfinite().all()
    sure = prediction_entropy(same, w, 1e-3)
    assert sure.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.autograd.grad(sure, same)[0].isfinite().all()


def test_under_autocast_it_stays_in_float32():
    z, w = projections(64, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = me_max(z, w, 0.1)
    torch.testing.assert_close(inside, me_max(z, w, 0.1))


def _rank(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    z, w = projections(24, 10)
    mine = z.detach().chunk(world)[rank].requires_grad_()
    value = me_max(mine, w, 0.1, group=dist.group.WORLD, prior=power_law(10, 0.5, like=w))
    grad_z, grad_w = torch.autograd.grad(value, (mine, w))
    dist.all_reduce(grad_w)
    torch.save((value.detach(), grad_z / world, grad_w / world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_process(world, tmp_path):
    mp.spawn(_rank, (world, str(tmp_path)), nprocs=world)
    z, w = projections(24, 10)
    value = me_max(z, w, 0.1, prior=power_law(10, 0.5, like=w))
    grad_z, grad_w = torch.autograd.grad(value, (z, w))
    found = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    for v, _, gw in found:
        torch.testing.assert_close(v, value.detach())
        torch.testing.assert_close(gw, grad_w)
    torch.testing.assert_close(torch.cat([gz for _, gz, _ in found]), grad_z)
