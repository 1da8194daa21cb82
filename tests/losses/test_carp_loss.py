"""CARP's loss against a float64 loop over blocks, images and pairs, by value and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranks import on_ranks
from uncollapse.losses.carp import carp_loss, fused_carp_loss, random_blocks
from uncollapse.targets.softmax import SoftmaxTargets


def brute_force(z, weight, z_teacher, weight_teacher, blocks, entropy_weight, temperature=1.0, bias=None, bias_t=None):
    """One block, one image, one pair at a time; the softmax spelt out."""

    def softmax(x, w, b, block):
        logits = torch.stack([w[k] @ x + (0 if b is None else b[k]) for k in block.tolist()])
        e = torch.exp(logits - logits.max().detach())
        return e / e.sum()

    total = z[0].new_zeros(())
    for block in blocks:
        p = [[softmax(x / temperature, weight, bias, block) for x in view] for view in z]
        q = [[softmax(x, weight_teacher, bias_t, block).detach() for x in view] for view in z_teacher]
        terms = [
            -torch.log((a * b).sum())
            for v, student in enumerate(p)
            for j, teacher in enumerate(q)
            if v != j
            for a, b in zip(student, teacher, strict=True)
        ]
        everyone = [r for view in [*p, *q] for r in view]
        mean = torch.stack(everyone).mean(0)
        total = total + torch.stack(terms).mean() + entropy_weight * (math.log(len(block)) + (mean * mean.log()).sum())
    return total / len(blocks)


def random_case(seed, views, seen, n, k, d):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(views, n, d, generator=g, dtype=torch.float64)
    weight = torch.nn.functional.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=-1)
    z_teacher = 2 * torch.randn(seen, n, d, generator=g, dtype=torch.float64)
    weight_teacher = torch.nn.functional.normalize(torch.randn(k, d, generator=g, dtype=torch.float64), dim=-1)
    return z.requires_grad_(), weight.requires_grad_(), z_teacher, weight_teacher


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    views=st.integers(2, 4),
    n=st.integers(1, 3),
    k=st.integers(4, 13),
    size=st.integers(2, 4),
    entropy_weight=st.sampled_from([0.0, 1.0, 2.5]),
    with_bias=st.booleans(),
)
def test_both_forms_equal_brute_force_by_value_and_gradient(seed, views, n, k, size, entropy_weight, with_bias):
    z, weight, z_teacher, weight_teacher = random_case(seed, views, 2, n, k, 3)
    bias = torch.linspace(-1, 1, k).double() if with_bias else None
    bias_t = torch.linspace(0.5, -1, k).double() if with_bias else None
    blocks = random_blocks(k, size, seed, 0)
    expected = brute_force(z, weight, z_teacher, weight_teacher, blocks, entropy_weight, 0.7, bias, bias_t)
    gradients = torch.autograd.grad(expected, (z, weight))
    plain = carp_loss(
        [x @ weight.T / 0.7 + (0 if bias is None else bias) for x in z],
        [x @ weight_teacher.T + (0 if bias_t is None else bias_t) for x in z_teacher],
        blocks,
        entropy_weight,
    )
    targets = SoftmaxTargets(z_teacher, weight_teacher, 1.0, bias_t)
    fused = fused_carp_loss(list(z), weight, targets, blocks, entropy_weight, 0.7, bias)
    for loss in (plain, fused):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, (z, weight)), gradients)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_how_many_blocks_are_in_flight_does_not_matter(at_once, monkeypatch):
    monkeypatch.setattr("uncollapse.losses.carp.rows_at_once", lambda *_, **__: at_once)
    z, weight, z_teacher, weight_teacher = random_case(5, 4, 2, 6, 42, 7)
    blocks = random_blocks(42, 8, 1, 2)  # two prototypes left over
    targets = SoftmaxTargets(z_teacher, weight_teacher, 1.0)
    expected = carp_loss([x @ weight.T for x in z], [x @ weight_teacher.T for x in z_teacher], blocks)
    actual = fused_carp_loss(list(z), weight, targets, blocks)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(3 * expected, (z, weight))
    torch.testing.assert_close(torch.autograd.grad(3 * actual, (z, weight), retain_graph=True), gradients)
    torch.testing.assert_close(torch.autograd.grad(2 * actual, (z, weight)), [2 / 3 * g for g in gradients])


def test_hopeless_pairs_are_clamped_in_both_forms():
    """Teacher and student sure of different prototypes: a finite loss, no gradient from that pair."""
    weight = torch.eye(4, requires_grad=True)
    z = [torch.tensor([[90.0, 0, 0, 0]], requires_grad=True) for _ in range(2)]
    z_teacher = torch.tensor([[[0.0, 90, 0, 0]], [[0.0, 90, 0, 0]]])
    blocks = torch.arange(4).view(1, 4)
    plain = carp_loss([x @ weight.T for x in z], [x @ weight.detach().T for x in z_teacher], blocks)
    fused = fused_carp_loss(z, weight, SoftmaxTargets(z_teacher, weight.detach(), 1.0), blocks)
    assert torch.isfinite(fused)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(
        torch.autograd.grad(fused, [*z, weight]), torch.autograd.grad(plain, [*z, weight]), rtol=1e-4, atol=1e-7
    )


def test_float32_agrees_with_float64():
    z, weight, z_teacher, weight_teacher = random_case(8, 6, 2, 16, 64, 16)
    blocks = random_blocks(64, 16, 0, 0)
    targets = SoftmaxTargets(z_teacher, weight_teacher, 1.0)
    exact = fused_carp_loss(list(z), weight, targets, blocks)
    single = fused_carp_loss(
        list(z.float()), weight.float(), SoftmaxTargets(z_teacher.float(), weight_teacher.float(), 1.0), blocks
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)


@given(
    k=st.integers(2, 60),
    size=st.integers(2, 60),
    seed=st.integers(0, 2**40),
    step=st.integers(0, 10**6),
)
def test_blocks_deal_every_prototype_at_most_once(k, size, seed, step):
    if size > k:
        with pytest.raises(ValueError, match="cannot be dealt"):
            random_blocks(k, size, seed, step)
        return
    blocks = random_blocks(k, size, seed, step)
    assert blocks.shape == (k // size, size)
    assert len(set(blocks.flatten().tolist())) == blocks.numel()
    assert torch.equal(blocks, random_blocks(k, size, seed, step))


def test_steps_deal_differently():
    deals = {tuple(random_blocks(32, 4, 7, step).flatten().tolist()) for step in range(20)}
    assert len(deals) == 20


def test_shapes_that_do_not_fit_are_named():
    z, weight, z_teacher, weight_teacher = random_case(0, 3, 2, 4, 8, 3)
    with pytest.raises(ValueError, match="teacher: 3 images"):
        fused_carp_loss(
            list(z), weight, SoftmaxTargets(z_teacher[:, :3], weight_teacher, 1.0), random_blocks(8, 4, 0, 0)
        )


def views_of(rank):
    rng = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(views, 3, 6, dtype=torch.float64, generator=rng) for views in (4, 2)]


def both_sides():
    return torch.randn(2, 21, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def on_one_rank(group):
    z, z_t = views_of(torch.distributed.get_rank(group))
    weight, weight_t = both_sides()
    z.requires_grad_()
    weight.requires_grad_()
    targets = SoftmaxTargets(z_t, weight_t, 1.0)
    loss = fused_carp_loss(list(z), weight, targets, random_blocks(21, 5, 3, 4), 1.5, group=group)
    return loss.detach(), *torch.autograd.grad(loss, (z, weight))


def test_the_mean_is_taken_over_all_ranks(tmp_path):
    """Means over ranks of the losses and of the prototypes' gradients are those of one process. A rank's own views
    get the gradient of its own share, two times as much. 1e-9 in float64, where only the order of sums differs."""
    ranks = on_ranks(on_one_rank, 2, tmp_path)
    z, z_t = zip(*map(views_of, range(2)), strict=True)
    weight, weight_t = both_sides()
    for leaf in (*z, weight):
        leaf.requires_grad_()
    student = [x @ weight.T for x in torch.cat(z, 1)]
    loss = carp_loss(student, [x @ weight_t.T for x in torch.cat(z_t, 1)], random_blocks(21, 5, 3, 4), 1.5)
    *by_rank, of_weight = torch.autograd.grad(loss, (*z, weight))
    values, of_z, of_prototypes = zip(*ranks, strict=True)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(sum(values) / 2, loss.detach(), **close)
    torch.testing.assert_close(sum(of_prototypes) / 2, of_weight, **close)
    for own, expected in zip(of_z, by_rank, strict=True):
        torch.testing.assert_close(own, 2 * expected, **close)
