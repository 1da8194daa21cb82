"""The online mixture against one-observation-at-a-time EM in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from uncollapse.losses.pairs import dino_loss, fused_dino_loss
from uncollapse.prototypes.decoupled import MixturePrototypes
from uncollapse.prototypes.gaussians import forget, forgetting_factor
from uncollapse.prototypes.mixture import OnlineMixture


def rows(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def build(covariance="diagonal", k=5, d=4, n=6, **options):
    options = {"balance": "none", "memory_steps": 20.0, "centred": False, **options}
    mixture = OnlineMixture(k, d, n, covariance, generator=torch.Generator().manual_seed(0), **options)
    g = torch.Generator().manual_seed(1)
    mixture.variance.copy_(0.05 + 0.2 * torch.rand(mixture.variance.shape, generator=g))
    mixture.evidence.mul_(0.2 + torch.rand(k, generator=g))
    return mixture.double()


def brute_force_update(mixture, x, beta=1.0):
    """E-step and M-step of a diagonal mixture written from the definitions, component by component."""
    k, d = mixture.mean.shape
    mean, evidence = mixture.mean.tolist(), mixture.evidence.tolist()
    variance = mixture.variance.expand(k, d).tolist()
    total = sum(evidence)
    gamma = []
    for point in x.tolist():
        scores = []
        for j in range(k):
            s = math.log(evidence[j] / total)
            for t in range(d):
                s -= 0.5 * ((point[t] - mean[j][t]) ** 2 / variance[j][t] + math.log(2 * math.pi * variance[j][t]))
            scores.append(beta * s)
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        gamma.append([w / sum(weights) for w in weights])
    lam = math.exp(mixture.log_lambda)
    for j in range(k):
        w = sum(g[j] for g in gamma)
        g_w = (1 - lam**w) / (1 - lam)
        # Sufficient statistics S = N·mean and N·(variance + mean²), as the papers write them.
        n_new = lam**w * evidence[j] + g_w
        for t in range(d):
            first = sum(g[j] * p[t] for g, p in zip(gamma, x.tolist(), strict=True)) / w
            second = sum(g[j] * p[t] ** 2 for g, p in zip(gamma, x.tolist(), strict=True)) / w
            s1 = lam**w * evidence[j] * mean[j][t] + g_w * first
            s2 = lam**w * evidence[j] * (variance[j][t] + mean[j][t] ** 2) + g_w * second
            mean[j][t] = s1 / n_new
            variance[j][t] = max(s2 / n_new - mean[j][t] ** 2, mixture.variance_floor)
        evidence[j] = n_new
    return torch.tensor(gamma), torch.tensor(mean), torch.tensor(variance), torch.tensor(evidence)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), beta=st.floats(0.05, 1.0))
def test_update_equals_sufficient_statistics_in_float64(seed, n, beta):
    mixture, x = build(), rows(n, 4, seed).double()
    gamma, mean, variance, evidence = brute_force_update(mixture, x, beta)
    torch.testing.assert_close(mixture.responsibilities(x, beta), gamma.double(), rtol=1e-6, atol=1e-9)
    mixture.observe(x, beta=beta)
    torch.testing.assert_close(mixture.mean, mean.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mixture.variance, variance.double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(mixture.evidence, evidence.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("covariance", ["shared", "isotropic"])
def test_isotropic_posterior_equals_the_diagonal_one_with_equal_variances(covariance):
    narrow, x = build(covariance), rows(6, 4, 3).double()
    wide = build("diagonal")
    wide.variance.copy_(narrow.variance.expand(5, 4))
    wide.evidence.copy_(narrow.evidence)
    torch.testing.assert_close(narrow.responsibilities(x), wide.responsibilities(x), rtol=1e-6, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(log_lambda=st.floats(-3, -1e-4), w1=st.floats(0, 5), w2=st.floats(0, 5), start=st.floats(0.1, 1e4))
def test_forgetting_laws(log_lambda, w1, w2, start):
    def run(weights):
        evidence, mean = torch.tensor([start], dtype=torch.float64), 0.0
        for w in weights:
            evidence, rho = forget(log_lambda, torch.tensor([w], dtype=torch.float64), evidence)
            mean += float(rho) * (1.0 - mean)
        return float(evidence), mean

    assert run([0.0]) == (pytest.approx(start), 0.0)  # nothing seen, nothing forgotten
    assert run([w1, w2]) == pytest.approx(run([w1 + w2]), rel=1e-6, abs=1e-9)  # a semigroup in the weight
    limit = 1 / -math.expm1(log_lambda)
    assert run([w1])[0] <= max(start, limit) * (1 + 1e-9)


def test_memory_in_steps_means_the_same_at_any_k_and_batch():
    for k, n in [(16, 64), (1024, 256), (65536, 2048)]:
        log_lambda = forgetting_factor(10, k, n)
        mass = torch.tensor([n / k]).double()
        evidence, old = torch.tensor([1 / -math.expm1(log_lambda)]).double(), 1.0
        for _ in range(10):
            evidence, rho = forget(log_lambda, mass, evidence)
            old *= 1 - float(rho)
        assert old == pytest.approx(0.5, rel=1e-6)


def test_recovers_planted_clusters():
    centres = torch.eye(8)
    g = torch.Generator().manual_seed(0)
    mixture = OnlineMixture(8, 8, 128, "shared", 5.0, "sinkhorn", 0.1, False, generator=g)
    for _ in range(200):
        picked = torch.randint(8, (128,), generator=g)
        mixture.observe(F.normalize(centres[picked] + 0.05 * torch.randn(128, 8, generator=g), dim=-1))
    nearest = (F.normalize(mixture.mean, dim=-1) @ centres.T).max(0).values
    assert float(nearest.min()) > 0.99  # every planted cluster has a component of its own


def test_balancing_equalises_masses_that_bayes_leaves_unequal():
    def masses(balance):
        g = torch.Generator().manual_seed(0)
        mixture = OnlineMixture(32, 16, 64, "shared", 20.0, balance, 0.05, False, generator=g)
        tail = torch.tensor([0.9] + [0.1 / 7] * 7)
        total = torch.zeros(32)
        for step in range(400):
            x = F.normalize(
                torch.eye(16)[torch.multinomial(tail, 64, True, generator=g)] + 0.2 * torch.randn(64, 16, generator=g),
                dim=-1,
            )
            if step >= 300:
                total += mixture.responsibilities(x).sum(0)
            mixture.observe(x)
        return total / total.mean()

    assert float(masses("sinkhorn").min()) > 0.3
    assert float(masses("none").min()) < 0.1


def test_no_parameter_for_an_optimiser_to_touch():
    mixture = build()
    assert list(mixture.parameters()) == []
    assert {"mean", "variance", "evidence", "offset"} <= set(mixture.state_dict())


def test_offsets_stay_bounded():
    mixture = OnlineMixture(512, 8, 32, "shared", 20.0, "sinkhorn", 0.05)
    for step in range(100):
        mixture.observe(rows(32, 8, step))
    assert abs(float(mixture.offset.mean())) < 1e-4  # a common drift would eat float32's digits


def test_centred_directions_are_taken_from_the_middle_of_the_means():
    mixture = OnlineMixture(16, 8, 32, centred=True)
    mixture.mean += 3 * torch.eye(8)[0]  # a narrow cone: every pair of means is close in cosine
    expected = torch.stack([m - mixture.mean.sum(0) / 16 for m in mixture.mean])
    torch.testing.assert_close(mixture.directions(), F.normalize(expected, dim=-1))
    raw = F.normalize(mixture.mean, dim=-1)
    assert float((raw @ raw.T).mean()) > 0.8
    assert abs(float((mixture.directions() @ mixture.directions().T).mean())) < 0.2


@pytest.mark.parametrize("balance", ["none", "sinkhorn"])
@pytest.mark.parametrize("temperature", [None, 0.05])
@pytest.mark.parametrize("covariance", ["shared", "isotropic", "diagonal"])
def test_tiles_of_rows_change_nothing_but_rounding(covariance, temperature, balance):
    """In float64, so that rounding of 1e-15 cannot grow past the tolerance in ten updates."""
    options = {"balance": balance, "temperature": temperature, "centred": True}
    whole, tiled = build(covariance, 30, 6, 150, **options), build(covariance, 30, 6, 150, **options, budget=1)
    for step in range(10):
        x = rows(150, 6, step).double()
        weight = torch.rand(150, generator=torch.Generator().manual_seed(step)).double() if step % 2 else None
        whole.observe(x, weight, beta=0.5)
        tiled.observe(x, weight, beta=0.5)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(tiled.state_dict()[name], value, rtol=1e-9, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("covariance", ["shared", "isotropic", "diagonal"])
@pytest.mark.parametrize("balance", ["none", "sinkhorn"])
def test_no_array_of_rows_by_components_beyond_the_budget(covariance, balance):
    k, n, d = 5000, 640, 3
    mixture = OnlineMixture(k, d, n, covariance, balance=balance, budget=1 << 20)
    with Largest() as largest:
        mixture.observe(rows(n, d, 0))
    assert largest.numel == 64 * k  # the smallest tile; (n, K) would be ten times as much


def test_extreme_variances_and_far_components_stay_finite():
    for balance in ("none", "sinkhorn"):
        mixture = OnlineMixture(50, 4, 1, balance=balance, generator=torch.Generator().manual_seed(0))
        mixture.variance[::2] = 1e-4
        mixture.mean[0] = 100.0
        for step in range(20):
            mixture.observe(rows(1 + step % 3, 4, step))
        mixture.observe(rows(0, 4, 0))
        assert all(value.isfinite().all() for value in mixture.state_dict().values())
        assert mixture.responsibilities(rows(5, 4, 1)).isfinite().all()


def test_under_autocast_it_stays_in_its_own_float_type():
    inside, outside = (OnlineMixture(20, 8, 32, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    x = rows(32, 8, 0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside.observe(x)
        found = inside.responsibilities(x)
    outside.observe(x.float())
    assert torch.equal(inside.mean, outside.mean)
    assert torch.equal(found, outside.responsibilities(x.float()))


def test_responsibilities_pass_a_gradient_to_the_rows():
    mixture, x = build("diagonal"), rows(3, 4, 0).double().requires_grad_()
    assert torch.autograd.gradcheck(mixture.responsibilities, x)


@pytest.mark.parametrize("covariance", ["shared", "isotropic", "diagonal"])
@pytest.mark.parametrize("temperature", [None, 0.1])
def test_targets_of_a_set_are_its_responsibilities(covariance, temperature):
    """What training hands to the loss, as a product that is never stored, is the E-step's posterior."""
    rng = torch.Generator().manual_seed(0)
    mixture = OnlineMixture(50, 6, 40, covariance, 10, "sinkhorn", temperature, centred=True, generator=rng)
    z = torch.nn.functional.normalize(torch.randn(2, 20, 6, generator=rng), dim=-1)
    for _ in range(3):
        mixture.observe(z.flatten(0, 1))
    prototypes = MixturePrototypes(mixture)
    targets = prototypes.posterior(z, 0.1)
    torch.testing.assert_close(targets.dense().flatten(0, 1), mixture.responsibilities(z.flatten(0, 1)))
    weight = prototypes.affine("student", 0.1)[0]
    loss = fused_dino_loss([*z, z[0]], weight, targets, 0.1)
    expected = dino_loss([v @ weight.T / 0.1 for v in [*z, z[0]]], list(targets.dense()))
    torch.testing.assert_close(loss, expected)
