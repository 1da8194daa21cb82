"""The online mixture against one-observation-at-a-time EM in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.mixture import OnlineMixture, forget, forgetting_factor


def rows(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def build(covariance="diagonal", k=5, d=4, n=6, **options):
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
@given(
    log_lambda=st.floats(-3, -1e-4), w1=st.floats(0, 5), w2=st.floats(0, 5), start=st.floats(0.1, 1e4)
)  # fmt: skip
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


def test_order_of_rows_does_not_matter():
    x = rows(32, 4, 5).double()
    first, second = build(n=32), build(n=32)
    first.observe(x)
    second.observe(x.flip(0))
    torch.testing.assert_close(first.mean, second.mean, rtol=1e-9, atol=1e-12)


def test_weights_repeat_rows():
    x = rows(4, 4, 5).double()
    first, second = build(), build()
    first.observe(torch.cat([x, x[:1]]))
    second.observe(x, weight=torch.tensor([2.0, 1, 1, 1]).double())
    torch.testing.assert_close(first.mean, second.mean, rtol=1e-9, atol=1e-12)


def test_recovers_planted_clusters():
    centres = torch.eye(8)
    g = torch.Generator().manual_seed(0)
    mixture = OnlineMixture(8, 8, 128, "shared", 5.0, "sinkhorn", 0.1, generator=g)
    for _ in range(200):
        picked = torch.randint(8, (128,), generator=g)
        mixture.observe(F.normalize(centres[picked] + 0.05 * torch.randn(128, 8, generator=g), dim=-1))
    nearest = (F.normalize(mixture.mean, dim=-1) @ centres.T).max(0).values
    assert float(nearest.min()) > 0.99  # every planted cluster has a component of its own


@pytest.mark.parametrize("queue", [0, 256])
def test_balancing_equalises_masses_that_bayes_leaves_unequal(queue):
    def masses(balance):
        g = torch.Generator().manual_seed(0)
        mixture = OnlineMixture(32, 16, 64, "shared", 20.0, balance, 0.05, queue, generator=g)
        tail = torch.tensor([0.9] + [0.1 / 7] * 7)
        total = torch.zeros(32)
        for step in range(400):
            x = F.normalize(torch.eye(16)[torch.multinomial(tail, 64, True, generator=g)]
                            + 0.2 * torch.randn(64, 16, generator=g), dim=-1)  # fmt: skip
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


def test_offsets_and_queue_stay_bounded():
    mixture = OnlineMixture(512, 8, 32, "shared", 20.0, "sinkhorn", 0.05, queue=40)
    for step in range(100):
        mixture.observe(rows(32, 8, step))
    assert abs(float(mixture.offset.mean())) < 1e-4  # a common drift would eat float32's digits
    newest = torch.cat([rows(32, 8, 98)[-8:], rows(32, 8, 99)])
    assert torch.equal(mixture.queue.sort(0).values, newest.sort(0).values)


def test_a_batch_longer_than_the_queue():
    mixture = OnlineMixture(16, 8, 32, "shared", 20.0, "sinkhorn", 0.05, queue=10)
    mixture.observe(rows(32, 8, 0))
    assert torch.equal(mixture.queue.sort(0).values, rows(32, 8, 0)[-10:].sort(0).values)


def test_centred_directions_are_taken_from_the_middle_of_the_means():
    mixture = OnlineMixture(16, 8, 32, centred=True)
    mixture.mean += 3 * torch.eye(8)[0]  # a narrow cone: every pair of means is close in cosine
    expected = torch.stack([m - mixture.mean.sum(0) / 16 for m in mixture.mean])
    torch.testing.assert_close(mixture.directions(), F.normalize(expected, dim=-1))
    raw = F.normalize(mixture.mean, dim=-1)
    assert float((raw @ raw.T).mean()) > 0.8
    assert abs(float((mixture.directions() @ mixture.directions().T).mean())) < 0.2
