"""WE-SSL's three weightings beside brute force in float64, and heads that differ by their start alone."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from steps import Steps, small
from uncollapse.config.load import load_config
from uncollapse.config.methods import DINO
from uncollapse.losses.cross_entropy import fused_cross_entropy
from uncollapse.losses.ensemble import Head, fused_mean_loss
from uncollapse.methods import wessl
from uncollapse.methods.contract import At, Seen
from uncollapse.prototypes.sets import JointPrototypes
from uncollapse.targets.softmax import SoftmaxTargets

N, D, K, VIEWS = 5, 6, 9, 4
NAMES = ("cls", "head2", "head3")
TAU = {"teacher.temperature_start": 0.05, "teacher.temperature_warmup_epochs": 0, "teacher.temperature": 0.05}


def config(weighting, **keys):
    few = {"prototypes.count": K, "head.bottleneck": D, "run.batch": N, "method.heads": 3, "optim.min_lr": 0.0, **TAU}
    return load_config("wessl-vits16", {**few, "method.weighting": weighting, **keys})


class Made:
    """Projections by three heads, their sets and centres."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)

        def unit(*shape):
            return F.normalize(torch.randn(*shape, D, generator=g, dtype=torch.float64), dim=-1)

        self.student = {name: unit(VIEWS, N).requires_grad_() for name in NAMES}
        self.teacher = {name: unit(2, N) for name in NAMES}
        self.sets = {name: JointPrototypes(K, D, True, 0.0, g).double() for name in NAMES}
        for prototypes in self.sets.values():
            prototypes.teacher_v.normal_(generator=g)
        self.memory = {
            name: 0.1 * torch.randn(K, generator=g, dtype=torch.float64)
            for name in ("center", "center_head2", "center_head3")
        }

    def learned(self):
        return [*self.student.values(), *(p for s in self.sets.values() for p in (s.student_v, s.student_g))]

    def terms(self, c, at):
        targets = wessl.assign(c, Seen(self.teacher), self.sets, self.memory, at)
        return wessl.objective(c, Seen(self.student), targets, self.sets, at), targets

    def log_probabilities(self, name):
        return torch.log_softmax(self.student[name] @ self.sets[name].affine("student", 0.1)[0].T / 0.1, -1)


def brute(made, targets, weighting, gamma):
    """Algorithm 1, image by image and pair by pair."""
    log_s, t = {n: made.log_probabilities(n) for n in NAMES}, {n: targets[n].dense() for n in NAMES}
    pairs = [(v, q) for v in range(VIEWS) for q in range(2) if v != q]
    total = torch.zeros((), dtype=torch.float64)
    for v, q in pairs:
        for i in range(N):
            if weighting == "probability":
                mean_t = torch.stack([t[n][q, i] for n in NAMES]).mean(0)
                mean_s = torch.stack([log_s[n][v, i].exp() for n in NAMES]).mean(0)
                total = total - (mean_t * mean_s.log()).sum()
                continue
            entropy = torch.stack([-(t[n][q, i] * t[n][q, i].log()).sum() for n in NAMES])
            weight = torch.softmax(-entropy / gamma, 0) if weighting == "entropy" else torch.full((3,), 1 / 3)
            for w, n in zip(weight, NAMES, strict=True):
                total = total - w * (t[n][q, i] * log_s[n][v, i]).sum()
    return total / (N * len(pairs))


@pytest.mark.parametrize("targets_kind", ["sinkhorn", "centred"])
@pytest.mark.parametrize("weighting", ["entropy", "uniform", "probability"])
def test_loss_and_gradient_are_the_papers(weighting, targets_kind):
    made = Made()
    terms, targets = made.terms(config(weighting, **{"prototypes.targets": targets_kind}), At(0, 1e6, 1.0, 0, None))
    expected = brute(made, targets, weighting, 0.05 * math.log(K))
    torch.testing.assert_close(terms["cls"], expected, rtol=1e-6, atol=0)  # a weight is float32
    one, other = (torch.autograd.grad(loss, made.learned()) for loss in (terms["cls"], expected))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_confident_heads_count_more_and_the_temperature_of_that_falls_by_epoch():
    made, c = Made(), config("entropy")
    _, targets = made.terms(c, At(0, 0.0, 0.0, 0, None))
    entropy = torch.stack([-torch.special.xlogy(t, t).sum(-1) for t in (targets[n].dense() for n in NAMES)])
    for epoch, gamma in ((0.0, 0.5), (0.9, 0.5), (29.0, 0.05), (400.0, 0.05)):
        shares = wessl.shares(c, targets, At(0, epoch, 0.0, 0, None))
        torch.testing.assert_close(shares, torch.softmax(-entropy / (gamma * math.log(K)), 0))
    assert (shares.argmax(0) == entropy.argmin(0)).all()


@pytest.mark.parametrize("weighting", ["entropy", "uniform", "probability"])
def test_an_ensemble_of_one_head_is_dino(weighting):
    c = small("wessl", **{"method.heads": 1, "method.weighting": weighting})
    dino = replace(c, method=DINO(), prototypes=replace(c.prototypes, targets="sinkhorn"))
    one, other = Steps(c), Steps(dino)
    for _ in range(3):
        assert one.take().loss == pytest.approx(other.take().loss, abs=1e-5)


def test_heads_start_apart_and_the_same_in_every_arm():
    states = [Steps(small("wessl", kind)).state for kind in ("joint", "decoupled")]
    first, second = (dict(s.student.named_parameters()) for s in states)
    assert all(torch.equal(p, second[n]) for n, p in first.items())
    for a, b in (("cls", "head2"), ("head2", "head3")):
        assert not torch.equal(first[f"heads.{a}.mlp.0.weight"], first[f"heads.{b}.mlp.0.weight"])
        assert not torch.equal(*(states[0].prototypes(n).student_v for n in (a, b)))


def test_a_weight_for_each_teacher_view_of_each_image():
    """`fused_cross_entropy` with ``row_weight (n, T)`` beside the sum written out."""
    g = torch.Generator().manual_seed(1)
    z, w = (torch.randn(*s, D, generator=g, dtype=torch.float64).requires_grad_() for s in ((VIEWS, N), (K,)))
    bias = torch.randn(K, generator=g, dtype=torch.float64).requires_grad_()
    soft = SoftmaxTargets(*(torch.randn(*s, D, generator=g, dtype=torch.float64) for s in ((2, N), (K,))), 0.3)
    pairing = torch.rand(VIEWS, 2, generator=g, dtype=torch.float64)
    count = torch.rand(N, 2, generator=g, dtype=torch.float64)
    log_s = torch.log_softmax(z @ w.T / 0.2 + bias, -1)
    expected = -torch.einsum("iq,vq,qik,vik->", count, pairing, soft.dense(), log_s)
    for targets in (soft, list(soft.dense())):
        loss = fused_cross_entropy(z, w, targets, 0.2, pairing, count, bias)
        torch.testing.assert_close(loss, expected)
        one, other = (torch.autograd.grad(x, (z, w, bias), retain_graph=True) for x in (loss, expected))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="row_weight"):
        fused_cross_entropy(z, w, soft, 0.2, pairing, count[:, :1], bias)


def test_averages_over_heads_are_the_same_in_any_blocks_and_far_from_the_top(monkeypatch):
    """Prototypes so far away that a probability is 0 in float32 still have a logarithm."""
    g = torch.Generator().manual_seed(2)
    heads = []
    for _ in range(3):
        z, w = (30 * torch.randn(*s, D, generator=g) for s in ((VIEWS, N), (K,)))
        bias = torch.randn(K, generator=g)
        targets = SoftmaxTargets(torch.randn(2, N, D, generator=g), torch.randn(K, D, generator=g), 2.0)
        heads.append(Head(z.requires_grad_(), w.requires_grad_(), bias.requires_grad_(), targets))
    learned = [x for head in heads for x in head[:3]]
    wide = [Head(*(x.detach().double() for x in h[:3]), h.targets) for h in heads]
    expected = float(fused_mean_loss(wide, 1.0))
    whole = fused_mean_loss(heads, 1.0)
    gradients = torch.autograd.grad(whole, learned)
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("uncollapse.losses.ensemble.rows_at_once", lambda *_, **__: 2)
    parts = fused_mean_loss(heads, 1.0)
    torch.testing.assert_close(parts, whole)
    for a, b in zip(torch.autograd.grad(parts, learned), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_heads_that_do_not_go_together_are_refused():
    z, w = torch.zeros(3, 2, D), torch.zeros(K, D)
    head = Head(z, w, None, SoftmaxTargets(torch.zeros(2, 2, D), w, 1.0))
    with pytest.raises(ValueError, match="same views, images and prototypes"):
        fused_mean_loss([head, head._replace(weight=torch.zeros(K + 1, D))], 1.0)
