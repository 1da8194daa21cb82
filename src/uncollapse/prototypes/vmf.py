"""The normaliser of the von Mises–Fisher density, which DINO-vMF adds to its logits (Govindarajan et al., ICLR 2023).

DINO's assignment is the posterior of a mixture of vMF densities with mean directions ``w_k / ‖w_k‖``, concentrations
``κ_k = ‖w_k‖ / τ`` and equal weights, but for the normaliser ``C_p(κ_k)``, which plain DINO leaves out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uncollapse.checks import above_zero

_ORDER = 24.0
"""Debye's expansion in 1/ν is used from this order on; smaller orders are reached by recurrence from above."""


def log_vmf_normaliser(kappa: Tensor, dim: int) -> Tensor:
    """``log C_p(κ) = ν log κ - p/2 log 2π - log I_ν(κ)``, ``ν = p/2 - 1``: the log of a vMF density's normaliser.

    Debye's uniform expansion of I_ν to the fourth term (Abramowitz & Stegun 9.7.7), written so that ``log κ`` cancels
    and κ = 0 is an ordinary point; in float64 inside, within 1e-8 nats of exact values for every κ up to 10⁴ and p ≥ 2.
    Autograd gives the gradient ``-A_p(κ) = -I_{ν+1}(κ) / I_ν(κ)``.

    Args:
        kappa: any shape, ≥ 0.
        dim: p ≥ 2, length of the vectors on the sphere.

    Returns:
        Same shape as ``kappa``, float32, or float64 where ``kappa`` is. At κ = 10⁴ the value itself is near -10⁴, where
        float32 has steps of 1e-3: :func:`vmf_bias` takes out what prototypes have in common before it rounds.

    Raises:
        ValueError: ``dim`` below 2.
    """
    if dim < 2:
        raise ValueError(f"a direction has at least 2 coordinates, not {dim}")
    return _log_normaliser(kappa.double(), dim).to(torch.promote_types(kappa.dtype, torch.float32))


def vmf_bias(weight: Tensor, temperature: float) -> Tensor:
    """``log C_p(‖w_k‖ / τ)`` up to a constant: the ``bias`` of any objective's logits that turns it into its vMF form.

    The constant is the value at norm 1, which a softmax and its gradient do not see; taken out in float64 it leaves
    float32 the digits that tell prototypes apart. Over unit vectors every entry is 0 and the gradient leaves directions
    alone: weight-normalised prototypes with a frozen gain are DINO's own case. Student and teacher each take their own
    temperature.

    Args:
        weight: ``(K, D)``, prototypes; the gradient flows to their norms.
        temperature: above 0.

    Returns:
        ``(K,)`` float32, or float64 where ``weight`` is.

    Raises:
        ValueError: a temperature that is not above 0, or rows of fewer than 2 dimensions.
    """
    above_zero(temperature)
    if weight.ndim != 2 or weight.shape[1] < 2:
        raise ValueError(f"prototypes are (K, D) with D of at least 2, got {tuple(weight.shape)}")
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=-1, dtype=wide)
    kappa = norm.double() / temperature
    common = _log_normaliser(torch.full_like(kappa[:1].detach(), 1 / temperature), weight.shape[1])
    return (_log_normaliser(kappa, weight.shape[1]) - common).to(wide)


def _log_normaliser(kappa: Tensor, dim: int) -> Tensor:
    order = dim / 2 - 1
    steps = max(0, math.ceil(_ORDER - order))
    log_bessel = _debye(kappa, order + steps)
    if steps:
        # I_{j-1} / I_j = (2 j + κ I_{j+1} / I_j) / κ, whose κ cancels against that of κ^-ν.
        square = kappa.square()
        ratio = square * (_debye(kappa, order + steps + 1) - log_bessel).exp()  # κ I_{j+1} / I_j at the top
        for step in range(steps, 0, -1):
            below = 2 * (order + step) + ratio
            log_bessel = log_bessel + below.log()
            ratio = square / below
    return -dim / 2 * math.log(2 * math.pi) - log_bessel


def _debye(kappa: Tensor, order: float) -> Tensor:
    """``log(κ^-ν I_ν(κ))`` for ν well above 0."""
    t = torch.hypot(kappa / order, torch.ones_like(kappa))
    p = 1 / t
    q = p.square()
    u1 = p * (3 - 5 * q) / 24
    u2 = q * (81 + q * (-462 + q * 385)) / 1152
    u3 = p * q * (30375 + q * (-369603 + q * (765765 - q * 425425))) / 414720
    u4 = q * q * (4465125 + q * (-94121676 + q * (349922430 + q * (-446185740 + q * 185910725)))) / 39813120
    series = 1 + (u1 + (u2 + (u3 + u4 / order) / order) / order) / order
    head = order * (t - torch.log1p(t)) - order * math.log(order)
    return head - 0.5 * (math.log(2 * math.pi * order) + t.log()) + series.log()
