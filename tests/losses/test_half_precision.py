"""Half-precision arguments change the numbers by their own rounding alone: what is made from them is float32."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.losses.pairs import fused_dino_loss, fused_patch_loss
from uncollapse.prototypes.vmf import log_vmf_normaliser, vmf_bias
from uncollapse.targets.softmax import SoftmaxTargets

HALVES = [torch.float16, torch.bfloat16]
RNG = torch.Generator().manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, generator=RNG), dim=-1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("images", "views"), [(3, 10), (7, 3), (65, 2)])
def test_the_weight_of_a_row_is_not_rounded(dtype, images, views):
    """1 / (images · pairs) is no number of half precision: it was up to 3.4e-3 off, in loss and gradient."""
    z = [unit(images, 8).to(dtype).requires_grad_() for _ in range(views)]
    targets, w = SoftmaxTargets(unit(2, images, 8).to(dtype), unit(20, 8), 0.1), unit(20, 8).requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in z]
    loss, exact = fused_dino_loss(z, w, targets, 0.1), fused_dino_loss(wide, w, targets, 0.1)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(loss, w), torch.autograd.grad(exact, w)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-7)


def test_float64_projections_keep_their_digits():
    z, w = [unit(7, 8).double() for _ in range(3)], unit(20, 8)
    targets = SoftmaxTargets(torch.stack(z[:2]), w.double(), 0.1)
    log_p = torch.stack([torch.log_softmax(x @ w.double().T / 0.1, -1) for x in z])
    t = targets.dense()
    pairs = [-(t[q] * log_p[v]).sum(-1).mean() for q in range(2) for v in range(3) if v != q]
    torch.testing.assert_close(fused_dino_loss(z, w, targets, 0.1), torch.stack(pairs).mean(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_dense_targets_are_float32(dtype):
    z, w = unit(2, 30, 16).to(dtype), unit(500, 16).to(dtype)
    bias = torch.linspace(-3, 3, 500, dtype=dtype)
    targets = SoftmaxTargets(z, w, 0.04, bias)
    exact = torch.softmax(z.double() @ w.double().T / 0.04 + bias.double(), -1)
    assert targets.dense().dtype == torch.float32
    torch.testing.assert_close(targets.dense().double(), exact, rtol=1e-4, atol=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(targets.dense().double(), exact, rtol=1e-4, atol=1e-9)
    loss = fused_patch_loss(z[0].float(), w.float(), SoftmaxTargets(z[1], w, 0.04, bias), 0.1, torch.full((30,), 1.0))
    dense = fused_patch_loss(z[0].float(), w.float(), targets.dense()[1], 0.1, torch.full((30,), 1.0))
    torch.testing.assert_close(loss, dense)


@pytest.mark.parametrize("dtype", HALVES)
def test_vmf_is_float32_at_least(dtype):
    w = (unit(30, 256) * torch.linspace(0.5, 2, 30).unsqueeze(1)).to(dtype).requires_grad_()
    bias = vmf_bias(w, 0.1)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias.double(), vmf_bias(w.detach().double(), 0.1), rtol=1e-5, atol=1e-5)
    bias.sum().backward()
    assert w.grad.dtype == dtype
    assert w.grad.isfinite().all()
    assert vmf_bias(w.detach().double(), 0.1).dtype == torch.float64
    kappa = torch.tensor([3.0, 700.0], dtype=dtype)
    assert log_vmf_normaliser(kappa, 64).dtype == torch.float32
    torch.testing.assert_close(log_vmf_normaliser(kappa, 64), log_vmf_normaliser(kappa.double(), 64).float())
