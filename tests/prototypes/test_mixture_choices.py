"""What a mixture can do otherwise: assign hard, forget by steps, hold a floor, in blocks, through a map, renewed."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.config.schema import MixtureConfig, PrototypeConfig
from uncollapse.prototypes.build import build_prototypes
from uncollapse.prototypes.frame import Frame
from uncollapse.prototypes.mixture import OnlineMixture

K, D, N = 12, 6, 40


def rows(n=N, seed=0, d=D):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mixture(k=K, **options):
    return OnlineMixture(k, D, N, generator=torch.Generator().manual_seed(1), **options).double()


def test_hard_assignment_moves_each_component_by_the_rows_it_is_likeliest_for():
    m = mixture(balance="none", assignment="hard", memory_steps=3.0)
    x, before, full = rows().double(), m.mean.clone(), float(m.evidence[0])
    chosen = m.responsibilities(x).argmax(1)
    m.observe(x)
    for k in range(K):
        mine = x[chosen == k]
        gained = (1 - torch.tensor(m.log_lambda).double().exp() ** len(mine)) * full
        expected = before[k] if not len(mine) else before[k] + gained / full * (mine.mean(0) - before[k])
        torch.testing.assert_close(m.mean[k], expected)


def test_weights_count_as_copies_with_hard_assignment():
    one, other = mixture(assignment="hard"), mixture(assignment="hard")
    x = rows()
    one.observe(x, torch.full((N,), 2.0))
    other.observe(torch.cat([x, x]))
    torch.testing.assert_close(one.mean, other.mean)


def test_forgetting_by_steps_lets_the_next_row_move_a_component_the_more_the_longer_it_got_none():
    m, waited = (mixture(balance="none", forgetting="step", assignment="hard", memory_steps=2.0) for _ in range(2))
    x = F.normalize(m.mean[:1] + 0.1, dim=-1)
    waited.evidence[0] *= 0.01
    for one in (m, waited):
        one.variance.fill_(0.01)
        one.observe(x)
    start = mixture().mean[0]
    assert (waited.mean[0] - x[0]).norm() < 0.5 * (m.mean[0] - x[0]).norm() < 0.5 * (start - x[0]).norm()


def test_a_floor_lifts_the_starved_and_leaves_the_others():
    m = mixture(k=4, balance="floor")
    m.iterations = 200
    x = rows(400).double()
    m.mean.copy_(F.normalize(torch.cat([x[:3], -x.mean(0, keepdim=True) * 1e3]), dim=-1))
    m.variance.fill_(0.01)
    still = {name: getattr(m, name).clone() for name in ("mean", "variance")}
    m.observe(x)
    m.mean.copy_(still["mean"])
    m.variance.copy_(still["variance"])
    mass = m.responsibilities(x).sum(0) / len(x) * 4
    assert float(m.offset.min()) >= 0
    assert float(mass.min()) > 0.39
    assert float(mass.max()) > 1.1  # equal masses are not asked for


def test_blocks_are_mixtures_of_their_own():
    m = mixture(blocks=3)
    alone = [mixture(k=K // 3) for _ in range(3)]
    for i, one in enumerate(alone):
        one.log_lambda = m.log_lambda
        one.evidence.copy_(m.evidence[:4])
        one.mean.copy_(m.mean[4 * i : 4 * i + 4])
    for seed in range(3):
        x = rows(seed=seed).double()
        m.observe(x)
        for one in alone:
            # Scores do not see the middle of all means: only directions do.
            one.observe(x)
    torch.testing.assert_close(m.mean, torch.cat([one.mean for one in alone]))


def test_means_of_a_linear_mixture_are_one_map_of_directions_that_never_move():
    m = mixture(linear=True, memory_steps=5.0)
    codes = m.codes.clone()
    for seed in range(5):
        m.observe(rows(seed=seed) + 0.5)
    assert torch.equal(m.codes, codes)
    residual = m.mean - codes @ torch.linalg.lstsq(codes, m.mean)[0]
    assert float(residual.abs().max()) < 1e-12 < float((m.mean - codes).abs().max())


def test_no_evidence_at_first_lets_the_first_rows_take_the_means():
    m = mixture(saturated=False, assignment="hard", balance="none")
    x = rows()
    chosen = m.responsibilities(x.double()).argmax(1)
    m.observe(x)
    k = int(chosen[0])
    torch.testing.assert_close(m.mean[k], x[chosen == k].double().mean(0), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["centred", "whitened"])
def test_a_frame_gives_what_it_says_and_products_are_the_same_on_both_sides(kind):
    frame = Frame(D, kind).double()
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(2)).double()
    for seed in range(900):
        frame.observe(rows(200, seed).double() @ mix + 3)
    z = rows(4000, 999).double() @ mix + 3
    x = frame(z)
    assert float(x.mean(0).norm()) < 0.1
    assert float(x.square().sum(1).mean()) == pytest.approx(1, abs=0.1)
    spread = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert (float(spread[-1] / spread[0]) < 1.5) == (kind == "whitened")
    weight, bias = frame.back(rows(K, 3).double())
    torch.testing.assert_close(z @ weight.T + bias, x @ rows(K, 3).double().T)


@pytest.mark.parametrize("which", ["oldest", "idle"])
def test_renewal_puts_every_component_where_a_projection_is_in_so_many_steps(which):
    config = MixtureConfig(renew_steps=4.0, renew=which, memory_steps=1e9)
    prototypes = build_prototypes(PrototypeConfig("decoupled", count=K, mixture=config), D, N, 0)
    seen = []
    for step in range(4):
        seen.append(rows(seed=10 + step))
        prototypes.observe(seen[-1], 0.1)
    near = (prototypes.means() @ torch.cat(seen).T).amax(1)
    at_rows = near > 0.9999
    assert at_rows.all() if which == "oldest" else at_rows.sum() >= K // 4
    assert len(torch.unique(prototypes.means(), dim=0)) == K


def test_renewal_ends_where_it_is_told_to():
    config = MixtureConfig(renew_steps=1.0, renew_until=0.5, memory_steps=1e9)
    prototypes = build_prototypes(PrototypeConfig("decoupled", count=K, mixture=config), D, N, 0)
    before = prototypes.means().clone()
    prototypes.observe(rows(), 0.6)
    torch.testing.assert_close(prototypes.means(), before, atol=1e-4, rtol=0)
    prototypes.observe(rows(), 0.4)
    assert float((prototypes.means() - before).norm()) > 1


@pytest.mark.parametrize("option", [{"assignment": "firm"}, {"forgetting": "never"}, {"blocks": 5}])
def test_a_choice_that_is_none_is_refused(option):
    with pytest.raises(ValueError, match=r"must be one of|do not divide"):
        mixture(**option)
