"""Natural parameters, moments and tiles of responsibilities against the definitions in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from uncollapse.prototypes.gaussians import features, natural_parameters, update_moments
from uncollapse.targets.responsibilities import Components, Posterior, log_masses, sums

COVARIANCES = ["shared", "isotropic", "diagonal"]
TILED = 1  # bytes: the smallest tiles there are


def gaussians(k, d, covariance, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = {"shared": (1, 1), "isotropic": (k, 1), "diagonal": (k, d)}[covariance]
    mean = F.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=-1)
    return mean, 0.02 + torch.rand(shape, generator=g, dtype=torch.float64)


def points(n, d, seed=9):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(n=150, k=40, d=5, covariance="isotropic", sharpness=1.0, budget=1 << 28):
    mean, variance = gaussians(k, d, covariance)
    phi = features(points(n, d), covariance)
    eta = natural_parameters(mean, variance / sharpness, covariance, 0.0)
    offset = torch.linspace(-2, 1, k, dtype=torch.float64)
    components = Components(k, lambda part: eta[part].clone())
    return Posterior(phi, components, offset, budget), torch.softmax(phi @ eta.T + offset, 1), phi, eta


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_natural_parameters_give_the_log_density(covariance):
    mean, variance = gaussians(6, 4, covariance)
    x, weight = points(7, 4), torch.rand(6).double()
    expected = Normal(mean, variance.expand(6, 4).sqrt()).log_prob(x[:, None]).sum(-1) + weight.log()
    found = features(x, covariance) @ natural_parameters(mean, variance, covariance, weight.log()).T
    torch.testing.assert_close(found - 2 * math.log(2 * math.pi), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(covariance=st.sampled_from(["isotropic", "diagonal"]), seed=st.integers(0, 999), k=st.integers(1, 6))
def test_moments_are_those_of_old_and_new_data_together(covariance, seed, k):
    """Old data at weight 1 - ρ, new at weight ρ: the mixture of the two has this mean and this variance."""
    mean, variance = gaussians(k, 3, covariance, seed)
    x, p = points(5, 3, seed), torch.rand(5, k, generator=torch.Generator().manual_seed(seed)).double()
    rho = torch.rand(k, generator=torch.Generator().manual_seed(seed + 1)).double()
    found_mean = mean.clone()
    found_variance = update_moments(found_mean, variance.clone(), rho, p.T @ features(x, covariance), covariance)
    for j in range(k):
        weights = torch.cat([rho[j] * p[:, j] / p[:, j].sum(), (1 - rho[j]).unsqueeze(0)])
        firsts = torch.cat([x, mean[j : j + 1]])
        within = torch.cat([torch.zeros(5, 3).double(), variance[j].expand(1, 3)])
        centre = weights @ firsts
        spread = weights @ (within + (firsts - centre).square())
        spread = spread if covariance == "diagonal" else spread.mean(-1, keepdim=True)
        torch.testing.assert_close(found_mean[j], centre, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found_variance[j], spread, rtol=1e-9, atol=1e-12)


def test_a_component_that_got_nothing_stays():
    mean, variance = gaussians(2, 3, "diagonal")
    start, same = mean.clone(), variance.clone()
    found = update_moments(mean, variance, torch.zeros(2).double(), torch.zeros(2, 7).double(), "diagonal")
    assert torch.equal(mean, start)
    assert torch.equal(found, same)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("budget", [TILED, 1 << 28])
def test_sums_equal_the_dense_product(covariance, budget):
    found, p, phi, _ = posterior(covariance=covariance, budget=budget)
    weight = torch.rand(150).double()
    parts = [(part, some.clone()) for part, some in sums(found, weight)]
    expected = (p * weight.unsqueeze(-1)).T @ phi
    torch.testing.assert_close(torch.cat([s for _, s in parts]), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts[0][1][:, -1], expected[parts[0][0], -1])
    torch.testing.assert_close(log_masses(found).exp(), p.sum(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(log_masses(found, row_weight=weight).exp(), weight @ p, rtol=1e-10, atol=0)


@settings(max_examples=30, deadline=None)
@given(changes=st.lists(st.floats(0, 300), min_size=1, max_size=4), budget=st.sampled_from([TILED, 1 << 28]))
def test_offsets_that_move_far_lose_no_digits(changes, budget):
    """The scaling form must notice when what it threw away becomes large."""
    found, _, phi, eta = posterior(budget=budget, sharpness=30.0)
    found = Posterior(phi.float(), Components(40, lambda part: eta[part].float()), torch.zeros(40), budget)
    offset = torch.zeros(40, dtype=torch.float64)
    for i, size in enumerate(changes):
        change = size * torch.sin(torch.arange(40.0) * (i + 1))
        log_masses(found)
        found.add(change)
        offset += change
    exact = torch.log_softmax(phi.float().double() @ eta.float().double().T + offset, 1).logsumexp(0)
    near = exact > -25
    torch.testing.assert_close(log_masses(found).double()[near], exact[near], rtol=0, atol=5e-3)
    torch.testing.assert_close(log_masses(found, exact=True).double(), exact, rtol=1e-4, atol=5e-3)
