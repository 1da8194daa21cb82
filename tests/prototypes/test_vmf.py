"""The vMF normaliser against Bessel functions of 40 digits, its gradient against their ratio, and what it is for."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.prototypes.vmf import log_vmf_normaliser, vmf_bias

DIMS = (2, 3, 8, 64, 128, 256, 384, 1024)
KAPPAS = (1e-3, 0.1, 1.0, 10.0, 77.0, 300.0, 2500.0, 1e4)


def exact(kappa, dim):
    """log C_p and A_p = I_{ν+1} / I_ν."""
    with mpmath.workdps(40):
        order, k = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(kappa)
        bessel = mpmath.besseli(order, k)
        value = order * mpmath.log(k) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        return float(value), float(mpmath.besseli(order + 1, k) / bessel)


@pytest.mark.parametrize("dim", DIMS)
def test_values_and_gradients_equal_exact_bessel_functions(dim):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64, requires_grad=True)
    values = log_vmf_normaliser(kappa, dim)
    (slopes,) = torch.autograd.grad(values.sum(), kappa)
    expected = torch.tensor([exact(k, dim) for k in KAPPAS], dtype=torch.float64)
    torch.testing.assert_close(values, expected[:, 0], rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(slopes, -expected[:, 1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dim", DIMS)
def test_no_concentration_is_the_uniform_density(dim):
    area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    kappa = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = log_vmf_normaliser(kappa, dim)
    value.backward()
    assert float(value.detach()) == pytest.approx(-area, abs=1e-6)
    assert float(kappa.grad) == pytest.approx(0, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(log_kappa=st.floats(-6, 9), dim=st.integers(2, 1024))
def test_gradient_is_minus_a_mean_length(log_kappa, dim):
    """A_p is the mean of cos under the density: between 0 and 1, and what finite differences of log C_p give."""
    kappa = torch.tensor(math.exp(log_kappa), dtype=torch.float64, requires_grad=True)
    value = log_vmf_normaliser(kappa, dim)
    (slope,) = torch.autograd.grad(value, kappa)
    assert -1 < float(slope) < 0
    step = 1e-4 * math.exp(log_kappa)
    ends = log_vmf_normaliser(torch.tensor([math.exp(log_kappa) - step, math.exp(log_kappa) + step]).double(), dim)
    assert float(slope) == pytest.approx(float(ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=2e-6 / max(step, 1e-3))


def test_float32_is_the_float64_value_rounded():
    kappa = torch.logspace(-3, 3, 50)
    torch.testing.assert_close(log_vmf_normaliser(kappa, 256), log_vmf_normaliser(kappa.double(), 256).float())


def test_bias_differs_between_prototypes_as_the_normaliser_does():
    weight = torch.nn.functional.normalize(torch.randn(12, 256), dim=-1) * torch.linspace(0.2, 900, 12).unsqueeze(1)
    bias = vmf_bias(weight, 0.1)
    assert bias.dtype == torch.float32
    expected = torch.tensor([exact(float(k), 256)[0] for k in weight.double().norm(dim=-1) / 0.1])
    torch.testing.assert_close(bias - bias[0], expected - expected[0], rtol=1e-6, atol=1e-3)


def test_bias_of_unit_vectors_is_constant_and_leaves_directions_alone():
    weight = torch.nn.functional.normalize(torch.randn(20, 64, dtype=torch.float64), dim=-1).requires_grad_()
    bias = vmf_bias(weight, 0.1)
    torch.testing.assert_close(bias, torch.zeros_like(bias))
    (slope,) = torch.autograd.grad((bias * torch.randn(20)).sum(), weight)
    along = (slope * weight).sum(-1, keepdim=True) * weight
    torch.testing.assert_close(slope, along, rtol=1e-6, atol=1e-9)


def test_bias_has_the_chain_rule_through_the_norm():
    weight = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: torch.softmax(vmf_bias(w, 0.2), 0), (weight,))


def test_one_dimension_is_an_error():
    with pytest.raises(ValueError, match="at least 2"):
        log_vmf_normaliser(torch.ones(2), 1)
