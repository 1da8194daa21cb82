"""The rivals of KoLeo-Proto against float64 brute force, one pair at a time, and what they cannot see."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import Steps, small
from uncollapse.config.facts import arm_keys
from uncollapse.config.schema import RIVALS
from uncollapse.losses import diversity
from uncollapse.losses.diversity import (
    hyperspherical_energy,
    koleo_features,
    mst_length,
    orthogonality,
    repulsion,
    spanning_pairs,
    spread,
)
from uncollapse.prototypes.sets import JointPrototypes


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(w):
    """Of every ordered pair of rows on the sphere, by difference."""
    unit = [r / r.norm() for r in w]
    return {(i, j): (unit[i] - unit[j]).norm() for i, j in itertools.permutations(range(len(w)), 2)}


def gaussian(w):
    return torch.stack([torch.exp(-2 * d**2) for d in distances(w).values()]).mean().log()


def riesz(w, s):
    each = [-d.log() if s == 0 else d**-s for d in distances(w).values()]
    return torch.stack(each).mean()


def cosines(w):
    return torch.stack([(1 - d**2 / 2) ** 2 for d in distances(w).values()]).mean()


def kruskal(w):
    """Shortest edges first, each where it joins two pieces."""
    apart, piece, total = distances(w), list(range(len(w))), 0.0
    for i, j in sorted((pair for pair in apart if pair[0] < pair[1]), key=lambda pair: float(apart[pair].detach())):
        if piece[i] != piece[j]:
            total = total - apart[i, j] / len(w)
            piece = [piece[i] if p == piece[j] else p for p in piece]
    return total


CASES = {
    "repulsion": (repulsion, gaussian),
    "energy-0": (lambda w, **k: hyperspherical_energy(w, 0.0, 1e-9, **k), lambda w: riesz(w, 0)),
    "energy-1": (lambda w, **k: hyperspherical_energy(w, 1.0, 1e-9, **k), lambda w: riesz(w, 1)),
    "energy-2": (lambda w, **k: hyperspherical_energy(w, 2.0, 1e-9, **k), lambda w: riesz(w, 2)),
    "orthogonality": (lambda w, block=None: orthogonality(w), cosines),
    "mst": (lambda w, block=None: mst_length(w), kruskal),
}
REGULARISERS = {name: case[0] for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(2, 14), d=st.integers(2, 8), block=st.none() | st.integers(1, 9))
def test_value_and_gradient_are_those_of_every_pair(name, seed, k, d, block):
    ours, brute = CASES[name]
    w = (3 * rows(seed, k, d)).double().requires_grad_()
    value, expected = ours(w, block=block), brute(w)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    one, other = (torch.autograd.grad(2 * x, w)[0] for x in (value, expected))
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_float32_over_several_tiles(name):
    """Two clouds of near-duplicates among random rows; against the same in float64."""
    w = torch.cat([rows(0, 300, 24), rows(1, 1, 24) + 1e-2 * rows(2, 40, 24)])
    values, gradients = [], []
    for x in (w.requires_grad_(), w.detach().double().requires_grad_()):
        value = REGULARISERS[name](x, block=100)
        values.append(float(value.detach()))
        gradients.append(torch.autograd.grad(value, x)[0].double())
    assert value.dtype == torch.float64
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_descent_spreads_vectors_and_leaves_their_lengths(name):
    w = (rows(0, 1, 8) + 0.3 * rows(1, 48, 8)).requires_grad_()
    first = REGULARISERS[name](w).detach()
    for _ in range(20):
        (gradient,) = torch.autograd.grad(REGULARISERS[name](w), w)
        assert (gradient * w.detach()).sum(1).abs().max() < 1e-5 * (1 + gradient.norm())
        w.data -= 2.0 * gradient / gradient.norm(dim=1).max()
    last = REGULARISERS[name](w).detach()
    assert last < first - 0.1 * abs(first)


@pytest.mark.parametrize("name", CASES)
def test_lengths_and_autocast_change_nothing(name):
    w = rows(0, 30, 6).double()
    longer = w * torch.linspace(0.1, 9, 30)[:, None]
    torch.testing.assert_close(REGULARISERS[name](longer), REGULARISERS[name](w))
    single = w.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = REGULARISERS[name](single)
    assert torch.equal(inside, REGULARISERS[name](single))
    assert REGULARISERS[name](single.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_one_row_and_infinite_rows_are_refused(name):
    with pytest.raises(ValueError, match="K ≥ 2"):
        REGULARISERS[name](torch.ones(1, 4))
    with pytest.raises(ValueError, match="finite"):
        REGULARISERS[name](torch.tensor([[1.0, torch.inf], [0.0, 1.0], [1.0, 1.0]]))


def test_bounds():
    """At the vectors that reach them: all alike, a simplex, orthogonal rows."""
    alike = torch.ones(7, 5).double()
    assert float(repulsion(alike)) == pytest.approx(0, abs=1e-12)
    assert float(hyperspherical_energy(alike, 2.0, 0.1)) == pytest.approx(100)
    assert float(orthogonality(alike)) == pytest.approx(1)
    assert float(mst_length(alike)) == pytest.approx(0, abs=1e-7)
    assert float(orthogonality(torch.eye(5))) == 0
    simplex = torch.eye(6).double() - 1 / 6  # every two are √(2 · 6/5) apart
    apart = math.sqrt(12 / 5)
    assert float(repulsion(simplex)) == pytest.approx(-2 * apart**2)
    assert float(hyperspherical_energy(simplex, 1.0)) == pytest.approx(1 / apart, rel=1e-5)
    assert float(mst_length(simplex)) == pytest.approx(-5 / 6 * apart)


def test_orthogonality_does_not_tell_duplicates_where_there_are_more_rows_than_dimensions():
    """Four directions, 16 copies each: no gradient, and the least value that 64 rows in four dimensions can have."""
    copies = torch.eye(4).repeat(16, 1).double().requires_grad_()
    value = orthogonality(copies)
    assert float(value.detach()) == pytest.approx((64 - 4) / (4 * 63))
    assert torch.autograd.grad(value, copies)[0].abs().max() < 1e-12
    assert float(orthogonality(rows(0, 64, 4))) > float(value.detach())


@pytest.mark.parametrize("name", CASES)
def test_exact_duplicates_have_finite_values_and_gradients(name):
    w = rows(0, 20, 6)[torch.arange(40) % 20].requires_grad_()
    value = REGULARISERS[name](w)
    (gradient,) = torch.autograd.grad(value, w)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_an_older_tree_serves():
    w = rows(0, 50, 6).double()
    tree = spanning_pairs(w)
    assert tree.shape == (2, 49)
    assert torch.equal(mst_length(w, tree=tree), mst_length(w))
    moved = w + 0.3 * rows(1, 50, 6)
    unit = moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(mst_length(moved, tree=tree), -(unit[tree[0]] - unit[tree[1]]).norm(dim=1).sum() / 50)
    for wrong in (tree[:, 1:], tree.int()):
        with pytest.raises(ValueError, match="spanning_pairs"):
            mst_length(w, tree=wrong)


def test_no_k_by_k_array_is_stored(monkeypatch):
    """The largest tile that is asked for is the block's."""
    largest = []
    plain = diversity._squared
    monkeypatch.setattr(diversity, "_squared", lambda c, *a: largest.append(c.numel()) or plain(c, *a))
    for regulariser in (repulsion, hyperspherical_energy):
        regulariser(rows(0, 700, 4).requires_grad_(), block=64)
    assert max(largest) == 64 * 64
    assert len(largest) == 2 * 66  # every pair of the 11 blocks once


@pytest.mark.parametrize(("n", "images"), [(12, None), (12, 4), (11, 4), (9, 4)])
def test_koleo_on_features_compares_images_of_one_group(n, images):
    f = (2 * rows(0, n, 5)).double().requires_grad_()
    apart, total = distances(f), 0.0
    for i in range(n):
        group = [j for j in range(n) if j != i and (images is None or j // images == i // images)]
        total = total - (min(apart[i, j] for j in group).log() / n if group else 0.0)
    value = koleo_features(f, images)
    torch.testing.assert_close(value, total)
    one, other = (torch.autograd.grad(x, f)[0] for x in (value, total))
    torch.testing.assert_close(one, other)


def test_arguments_that_cannot_be_meant_are_refused():
    w = rows(0, 5, 3)
    for wrong in (
        lambda: repulsion(w, 0.0),
        lambda: hyperspherical_energy(w, -1.0),
        lambda: hyperspherical_energy(w, 1.0, 0.0),
        lambda: mst_length(w, 0.0),
    ):
        with pytest.raises(ValueError, match="above"):
            wrong()


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize("method", ["dino", "ibot-separate"])
def test_a_rival_is_in_force_in_training(method, kind):
    """Its weighted value is a named term for every set, and without learning from images it spreads the prototypes."""
    steps = Steps(small(method, **{**arm_keys(kind), "prototypes.koleo_weight": 3.0}))
    sets = steps.state.by_name
    before = {name: spread(kind, p.student_v.detach()) for name, p in sets.items()}
    done = steps.take()
    for name, prototypes in sets.items():
        assert done.terms[f"regulariser/{name}"] == pytest.approx(3 * float(before[name]), rel=1e-5)
        for _ in range(5):
            gradient = torch.autograd.grad(prototypes.regulariser(), prototypes.student_v)[0]
            prototypes.student_v.data -= 0.1 * gradient / gradient.norm(dim=1).max()
        assert spread(kind, prototypes.student_v.detach()) < before[name]


def test_the_tree_serves_for_some_steps_and_is_saved():
    def fresh():
        return JointPrototypes(30, 5, True, 0.1, torch.Generator().manual_seed(0), 3, diversity="mst")

    first, second = fresh(), fresh()
    first.regulariser()
    first.after_step()
    kept = first.neighbours.clone()
    first.student_v.data += rows(1, 30, 5)
    torch.testing.assert_close(first.regulariser(), 0.1 * mst_length(first.student_v, tree=kept))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.regulariser(), first.regulariser())
    for _ in range(2):
        first.after_step()
    torch.testing.assert_close(first.regulariser(), 0.1 * mst_length(first.student_v))


def test_an_unknown_regulariser_is_refused():
    with pytest.raises(ValueError, match="there are koleo, mst"):
        spread("dpp", rows(0, 5, 3))
