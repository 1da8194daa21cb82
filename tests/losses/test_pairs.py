"""DINO's loss, centring and Sinkhorn against float64 loops that follow the paper's sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.losses.logits import fused_dino_loss_on_logits
from uncollapse.losses.pairs import dino_loss, fused_dino_loss, fused_patch_loss, patch_weights
from uncollapse.prototypes.vmf import vmf_bias
from uncollapse.targets.sinkhorn import centred_softmax, sinkhorn, sinkhorn_offsets
from uncollapse.targets.softmax import SoftmaxTargets


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
                top = logits.detach().max()
                log_p = logits - torch.log(torch.exp(logits - top).sum()) - top
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
    on_logits = fused_dino_loss_on_logits([temperature * x for x in logits], targets, temperature)
    torch.testing.assert_close(on_logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_fused_gradients_equal_autograd_of_the_plain_form(views, monkeypatch):
    # Several blocks of rows, the last one ragged.
    monkeypatch.setattr("uncollapse.losses.cross_entropy.rows_at_once", lambda *_, **__: 3)
    z, weight, targets = random_case(3, views, 2, 7, 11, 5)
    leaves = [x.double().requires_grad_() for x in [*z, weight]]
    targets = [t.double() for t in targets]
    plain = dino_loss([x @ leaves[-1].T / 0.1 for x in leaves[:-1]], targets)
    expected = torch.autograd.grad(3 * plain, leaves)
    fused = fused_dino_loss(leaves[:-1], leaves[-1], targets, 0.1)
    actual = torch.autograd.grad(3 * fused, leaves)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(actual, expected)


def test_views_may_be_stacked():
    z, w = torch.randn(3, 5, 4), torch.randn(7, 4)
    targets = torch.softmax(torch.randn(2, 5, 7), -1)
    expected = dino_loss(list(z @ w.T / 0.1), list(targets))
    torch.testing.assert_close(dino_loss(z @ w.T / 0.1, targets), expected)
    torch.testing.assert_close(fused_dino_loss(z, w, targets, 0.1), expected)
    torch.testing.assert_close(fused_dino_loss_on_logits(z @ w.T, targets, 0.1), expected)


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


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    views=st.integers(2, 4),
    teacher_views=st.integers(1, 3),
    n=st.integers(1, 3),
    k=st.integers(2, 7),
    with_bias=st.booleans(),
)
def test_targets_made_on_the_way_equal_targets_as_arrays(seed, views, teacher_views, n, k, with_bias):
    """By value and by the gradient of projections, prototypes and bias, from brute force in float64."""
    teacher_views = min(views - (views == 1), teacher_views)
    z, weight, _ = random_case(seed, views, teacher_views, n, k, 4)
    g = torch.Generator().manual_seed(seed)
    z_teacher, weight_teacher, bias_teacher = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((teacher_views, n, 4), (k, 4), (k,))
    )
    leaves = [x.double().requires_grad_() for x in [*z, weight]]
    bias = torch.linspace(-1, 1, k).double().requires_grad_() if with_bias else None
    leaves += [bias] if with_bias else []
    targets = SoftmaxTargets(z_teacher, weight_teacher, 0.3, bias_teacher if with_bias else None)
    expected = brute_force_loss(leaves[:views], leaves[views], targets.dense(), 0.5, bias)
    logits = [x @ leaves[views].T / 0.5 + (0 if bias is None else bias) for x in leaves[:views]]
    losses = [
        fused_dino_loss(leaves[:views], leaves[views], targets, 0.5, bias),
        fused_dino_loss(leaves[:views], leaves[views], list(targets.dense()), 0.5, bias),
        fused_dino_loss_on_logits(logits, list(targets.dense())),
        fused_dino_loss_on_logits([0.3 * x for x in logits], list(targets.dense()), 0.3),
    ]
    gradients = torch.autograd.grad(expected, leaves, materialize_grads=True)
    for loss in [*losses, dino_loss(logits, list(targets.dense()))]:
        torch.testing.assert_close(loss, expected)
        actual = torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(actual, gradients)


@pytest.mark.parametrize("form", ["arrays", "made on the way", "on logits"])
def test_a_graph_walked_twice_gives_both_gradients(form):
    z, weight, targets = random_case(4, 4, 2, 5, 9, 3)
    x = torch.stack(z).requires_grad_()
    if form == "on logits":
        loss = fused_dino_loss_on_logits([v @ weight.T for v in x], targets)
    else:
        soft = SoftmaxTargets(torch.stack(z[:2]), weight, 0.2)
        loss = fused_dino_loss(list(x), weight, soft if form != "arrays" else targets, 0.1)
    first = torch.autograd.grad(3 * loss, x, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], first / 3)


def test_targets_whose_rows_do_not_sum_to_one():
    z, weight, targets = random_case(6, 4, 2, 5, 9, 3)
    targets = [0.3 * targets[0].double(), targets[1].double() * torch.rand(5, 1)]
    leaves = [x.double().requires_grad_() for x in [*z, weight]]
    logits = [x @ leaves[-1].T / 0.1 for x in leaves[:-1]]
    plain = dino_loss(logits, targets)
    gradients = torch.autograd.grad(plain, leaves, retain_graph=True)
    for loss in (fused_dino_loss(leaves[:-1], leaves[-1], targets, 0.1), fused_dino_loss_on_logits(logits, targets)):
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), gradients)


def test_logits_hundreds_apart_stay_finite():
    """Unnormalised projections: what float32's exponential cannot hold must not show."""
    z, weight, _ = random_case(7, 3, 2, 4, 30, 6)
    z = [(40 * x).requires_grad_() for x in z]
    targets = SoftmaxTargets(torch.stack(z[:2]).detach(), weight, 0.05)
    loss = fused_dino_loss(z, weight, targets, 0.1)
    exact = [x.detach().double().requires_grad_() for x in z]
    soft = SoftmaxTargets(torch.stack(exact[:2]).detach(), weight.double(), 0.05)
    expected = dino_loss([x @ weight.double().T / 0.1 for x in exact], list(soft.dense()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected, exact)
    for actual, wanted in zip(torch.autograd.grad(loss, z), gradients, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


def test_half_precision_projections_under_autocast_are_summed_in_float32():
    z, weight, targets = random_case(9, 3, 2, 8, 40, 16)
    exact = fused_dino_loss([x.bfloat16().float() for x in z], weight, targets, 0.1)
    halves = [x.bfloat16().requires_grad_() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_dino_loss(halves, weight, targets, 0.1)
    torch.testing.assert_close(loss, exact)
    loss.backward()
    assert halves[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("with_bias", [False, True])
def test_sinkhorn_targets_are_a_bias(with_bias):
    """SwAV: the balanced assignment of all teacher views' rows is a softmax with one offset per prototype."""
    z, weight, _ = random_case(10, 5, 2, 6, 12, 4)
    z, weight = [x.double() for x in z], weight.double()
    bias = torch.linspace(-2, 2, 12).double() if with_bias else torch.zeros(12).double()
    balanced = sinkhorn(torch.cat(z[:2]) @ weight.T / 0.05 + bias)
    offsets = sinkhorn_offsets(torch.cat(z[:2]), weight, 0.05, bias=bias if with_bias else None)
    targets = SoftmaxTargets(torch.stack(z[:2]), weight, 0.05, bias + offsets)
    torch.testing.assert_close(targets.dense().flatten(0, 1), balanced)
    expected = dino_loss([x @ weight.T / 0.1 for x in z], list(balanced.chunk(2)))
    torch.testing.assert_close(fused_dino_loss(z, weight, targets, 0.1), expected)


def test_vmf_is_a_bias_with_a_gradient():
    z, weight, _ = random_case(11, 4, 2, 5, 10, 8)
    weight = (weight.double() * torch.linspace(0.5, 2, 10).unsqueeze(1)).requires_grad_()
    z = [x.double() for x in z]
    targets = SoftmaxTargets(torch.stack(z[:2]), weight.detach(), 0.05, vmf_bias(weight.detach(), 0.05))
    loss = fused_dino_loss(z, weight, targets, 0.1, vmf_bias(weight, 0.1))
    plain = dino_loss([x @ weight.T / 0.1 + vmf_bias(weight, 0.1) for x in z], list(targets.dense()))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(plain, weight))


def brute_force_patches(z, weight, targets, temperature, mask, over):
    """iBOT's sums: the mean over an image's masked patches, 0 where there are none, the mean over images."""
    images, i = [], 0
    for row in mask:
        terms = []
        for masked in row.tolist():
            if masked:
                logits = weight @ z[i] / temperature
                terms.append(-(targets[i] * (logits - torch.log(torch.exp(logits).sum()))).sum())
                i += 1
        images.append(torch.stack(terms).mean() if terms else z.new_zeros(()))
    return torch.stack(images).sum() / over


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 5), patches=st.integers(1, 6), share=st.floats(0, 1))
def test_patch_loss_equals_brute_force(seed, n, patches, share):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, patches, generator=g) < share
    m = int(mask.sum())
    z, z_teacher = (torch.randn(m, 4, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64).requires_grad_()
    z.requires_grad_()
    targets = SoftmaxTargets(z_teacher, weight.detach(), 0.5)
    for counted in (True, False):
        over = n if counted else max(1, int(mask.any(-1).sum()))
        expected = brute_force_patches(z, weight, targets.dense(), 0.3, mask, over)
        for given_as in (targets, targets.dense()):
            loss = fused_patch_loss(z, weight, given_as, 0.3, patch_weights(mask, counted))
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
            if m:
                gradients = torch.autograd.grad(expected, (z, weight), retain_graph=True)
                torch.testing.assert_close(torch.autograd.grad(loss, (z, weight)), gradients, rtol=1e-6, atol=1e-6)
            else:
                assert float(torch.autograd.grad(loss, weight)[0].abs().sum()) == 0


def test_patches_in_several_blocks_with_a_bias(monkeypatch):
    monkeypatch.setattr("uncollapse.losses.cross_entropy.rows_at_once", lambda *_, **__: 3)
    z, weight, targets = random_case(12, 1, 1, 17, 11, 5)
    leaves = [z[0].double().requires_grad_(), weight.double().requires_grad_(), torch.randn(11).double()]
    leaves[2].requires_grad_()
    a = torch.rand(17).double()
    log_p = torch.log_softmax(leaves[0] @ leaves[1].T / 0.1 + leaves[2], dim=-1)
    plain = (a * -(targets[0].double() * log_p).sum(-1)).sum()
    fused = fused_patch_loss(leaves[0], leaves[1], targets[0].double(), 0.1, a, leaves[2])
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(fused, leaves), torch.autograd.grad(plain, leaves))


def test_prototypes_that_the_teacher_has_ruled_out():
    """A dead component's log-weight is -inf."""
    z, weight, _ = random_case(13, 3, 2, 4, 6, 5)
    bias = torch.tensor([0.0, -torch.inf, 1.0, 0.0, -torch.inf, 0.5])
    targets = SoftmaxTargets(torch.stack(z[:2]), weight, 0.1, bias)
    plain = dino_loss([x @ weight.T / 0.1 for x in z], list(targets.dense()))
    torch.testing.assert_close(fused_dino_loss(z, weight, targets, 0.1), plain)
    patch = fused_patch_loss(z[2], weight, SoftmaxTargets(z[0], weight, 0.1, bias), 0.1, torch.full((4,), 0.25))
    torch.testing.assert_close(patch, dino_loss([z[2] @ weight.T / 0.1] * 2, list(targets.dense()[:1])))


def test_patch_weights_sum_to_the_share_of_masked_crops():
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False], [False, False, False]])
    torch.testing.assert_close(patch_weights(mask), torch.tensor([0.125, 0.125, 0.25]))
    torch.testing.assert_close(patch_weights(mask, unmasked_count=False), torch.tensor([0.25, 0.25, 0.5]))


def test_shapes_that_do_not_fit_are_named():
    z, weight, targets = random_case(0, 3, 2, 4, 8, 3)
    with pytest.raises(ValueError, match="prototypes of the targets is 7, not 8"):
        fused_dino_loss(z, weight, [t[:, :7] for t in targets], 0.1)
    with pytest.raises(ValueError, match="row_weight is"):
        fused_patch_loss(z[0], weight, targets[0], 0.1, torch.ones(3))
    with pytest.raises(ValueError, match="pairing is"):
        fused_cross_entropy(torch.stack(z), weight, targets, 0.1, torch.ones(3, 3), torch.ones(4))
    with pytest.raises(ValueError, match="one more view"):
        fused_dino_loss(z[:1], weight, targets[:1], 0.1)


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
