"""DINO's loss, centring and Sinkhorn against float64 loops that follow the paper's sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.assign import centred_softmax, sinkhorn
from uncollapse.losses import dino_loss, fused_dino_loss
from uncollapse.methods.dino import DINO
from uncollapse.prototypes import FixedPrototypes


def brute_force_loss(z, weight, targets, temperature, bias=None):
    """Every pair on its own, one image at a time, in float64."""
    terms = []
    for q, target in enumerate(targets):
        for v, view in enumerate(z):
            if v == q:
                continue
            for t, x in zip(target, view, strict=True):
                logits = weight.double() @ x.double() / temperature
                if bias is not None:
                    logits = logits + bias.double()
                log_p = logits - math.log(sum(math.exp(l - logits.max()) for l in logits.tolist())) - logits.max()
                terms.append(-(t.double() * log_p).sum())
    return torch.stack(terms).mean()


def random_case(seed, views, teacher_views, n, k, d):
    g = torch.Generator().manual_seed(seed)
    z = [torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=-1) for _ in range(views)]
    weight = torch.nn.functional.normalize(torch.randn(k, d, generator=g), dim=-1)
    targets = [torch.softmax(3 * torch.randn(n, k, generator=g), -1) for _ in range(teacher_views)]
    return z, weight, targets


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    views=st.integers(2, 5),
    n=st.integers(1, 4),
    k=st.integers(2, 9),
    d=st.integers(2, 6),
    temperature=st.floats(0.04, 1.0),
    use_bias=st.booleans(),
)
def test_both_forms_equal_brute_force(seed, views, n, k, d, temperature, use_bias):
    z, weight, targets = random_case(seed, views, 2, n, k, d)
    bias = torch.linspace(-1, 1, k) if use_bias else None
    expected = brute_force_loss(z, weight, targets, temperature, bias)
    logits = [x @ weight.T / temperature + (bias if use_bias else 0) for x in z]
    torch.testing.assert_close(dino_loss(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)
    fused = fused_dino_loss(z, weight, targets, temperature, bias)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_fused_gradients_equal_autograd_of_the_plain_form(views, monkeypatch):
    monkeypatch.setattr("uncollapse.losses._BLOCK", 40)  # several blocks of rows, the last one ragged
    z, weight, targets = random_case(3, views, 2, 7, 11, 5)
    leaves = [x.double().requires_grad_() for x in [*z, weight]]
    targets = [t.double() for t in targets]
    plain = dino_loss([x @ leaves[-1].T / 0.1 for x in leaves[:-1]], targets)
    expected = torch.autograd.grad(3 * plain, leaves)
    fused = fused_dino_loss(leaves[:-1], leaves[-1], targets, 0.1)
    actual = torch.autograd.grad(3 * fused, leaves)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(actual, expected)


def test_gradient_check():
    z, weight, targets = random_case(0, 3, 2, 2, 4, 3)
    stacked = torch.stack(z).double().requires_grad_()
    weight = weight.double().requires_grad_()
    targets = [t.double() for t in targets]
    assert torch.autograd.gradcheck(lambda a, w: fused_dino_loss(list(a), w, targets, 0.5), (stacked, weight))


def test_fixed_prototypes_get_no_gradient():
    z, weight, targets = random_case(1, 3, 2, 4, 8, 4)
    z[0].requires_grad_()
    fused_dino_loss(z, weight, targets, 0.1).backward()
    assert weight.grad is None
    assert z[0].grad is not None


def test_uniform_student_has_loss_ln_k():
    _, _, targets = random_case(2, 2, 2, 5, 16, 4)
    logits = [torch.zeros(5, 16) for _ in range(3)]
    assert float(dino_loss(logits, targets)) == pytest.approx(math.log(16), rel=1e-6)


def test_one_view_is_an_error():
    with pytest.raises(ValueError, match="one more view"):
        dino_loss([torch.zeros(2, 3)], [torch.ones(2, 3) / 3])


def test_centred_softmax_subtracts_before_dividing():
    logits, center = torch.randn(4, 6), torch.randn(6)
    rows = [[math.exp((float(l) - float(c)) / 0.07) for l, c in zip(row, center, strict=True)] for row in logits]
    expected = torch.tensor([[e / sum(row) for e in row] for row in rows])
    torch.testing.assert_close(centred_softmax(logits, center, 0.07), expected)


def test_center_follows_the_mean_of_raw_logits():
    prototypes = FixedPrototypes(12, 5, torch.Generator().manual_seed(0))
    objective = DINO(12, center_momentum=0.9)
    expected = torch.zeros(12, dtype=torch.float64)
    for step in range(4):
        z = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(step))
        objective.update_center(z.mean((0, 1)), prototypes)
        logits = torch.stack([prototypes.weight.double() @ x.double() for x in z.reshape(-1, 5)])
        expected = 0.9 * expected + 0.1 * logits.mean(0)
    torch.testing.assert_close(objective.center.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), k=st.integers(2, 8))
def test_sinkhorn_equals_a_float64_loop(seed, n, k):
    scores = 2 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    p = scores.double().exp()
    for _ in range(3):
        p = p / p.sum(0, keepdim=True)
        p = p / p.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn(scores).double(), p, rtol=1e-4, atol=1e-6)


def test_sinkhorn_balances_columns():
    scores = 5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    mass = sinkhorn(scores, iterations=50).sum(0)
    torch.testing.assert_close(mass, torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
