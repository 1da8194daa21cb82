"""Components that are put anew where rows are."""

import pytest
import torch
import torch.nn.functional as F

from uncollapse.config.schema import MixtureConfig, PrototypeConfig
from uncollapse.prototypes.build import build_prototypes
from uncollapse.prototypes.mixture import OnlineMixture

K, D, N = 12, 6, 4


def rows(n=N, seed=0):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=-1)


def build(renewed=1.0, k=K, **options):
    # So long a memory that nothing but renewal moves a mean.
    options = {"covariance": "shared", "memory_steps": 1e12, **options}
    return OnlineMixture(k, D, N, renewed=renewed, generator=torch.Generator().manual_seed(1), **options)


def test_components_are_the_newest_rows():
    m = build()
    batches = [rows(seed=s) for s in range(5)]
    for x in batches:
        m.observe(x)
    newest = torch.cat(batches[-3:])  # K / N = 3 updates
    cosines = m.mean @ newest.T
    assert torch.equal(cosines.argmax(1).sort().values, torch.arange(K))
    torch.testing.assert_close(cosines.amax(1), torch.ones(K))


def test_rows_at_hand_are_among_the_components_of_their_own_targets():
    m = build(temperature=0.01, centred=False)
    for seed in range(4):
        m.observe(rows(seed=seed))
    own = m.mean @ rows(seed=3).T
    assert torch.equal(m.targets(rows(seed=3)).dense().argmax(1), own.argmax(0))


@pytest.mark.parametrize("renewed", [0.25, 0.5, 0.75])
def test_a_share_of_the_rows_is_taken_and_not_always_the_same_places(renewed):
    m, places, total = build(renewed), [], 200
    for seed in range(total):
        x, before = rows(seed=seed), m.mean.clone()
        m.observe(x)
        moved = m.mean[(m.mean - before).abs().amax(1) > 1e-4]
        places.extend((moved @ x.T).argmax(1).tolist())
    assert len(places) == pytest.approx(renewed * N * total, rel=0.02)
    counts = torch.bincount(torch.tensor(places), minlength=N)
    assert int(counts.min()) > 0.8 * renewed * total


def test_without_renewal_nothing_is_put_anew():
    m = build(0.0)
    before = m.mean.clone()
    m.observe(rows())
    torch.testing.assert_close(m.mean, before, atol=1e-6, rtol=0)
    assert int(m.renewals) == 0


def test_rows_that_count_once_are_all_taken_beside_many_that_count_little():
    m = build(k=40)
    few, many = rows(4, seed=1), rows(64, seed=2)
    m.observe(torch.cat([few, many]), torch.cat([torch.ones(4), torch.full((64,), 4 / 64)]))
    assert int(m.renewals) == 8
    assert float((few @ m.mean.T).amax(1).min()) > 0.9999
    taken = (many @ m.mean.T).amax(1) > 0.9999
    assert int(taken.sum()) == 4


def test_rows_without_weight_are_never_taken_and_more_rows_than_components_fit():
    m = build()
    x = rows(100, seed=3)
    weight = torch.ones(100)
    weight[::2] = 0
    m.observe(x, weight)
    assert int(m.renewals) == K
    nearest = (m.mean @ x.T).argmax(1)
    assert len(nearest.unique()) == K
    assert bool((nearest % 2 == 1).all())


def test_only_prototypes_that_stay_can_be_followed():
    renewed, clustering = MixtureConfig(), MixtureConfig(renewed=0.0)
    kinds = [build_prototypes(PrototypeConfig("decoupled", count=K, mixture=m), D, N, 0) for m in (renewed, clustering)]
    assert [(p.lasting, p.in_order) for p in kinds] == [(False, True), (True, False)]


def test_a_state_goes_on_where_it_was():
    one, other = build(0.5), build(0.5)
    for seed in range(3):
        one.observe(rows(seed=seed))
    other.load_state_dict(one.state_dict())
    for m in (one, other):
        m.observe(rows(seed=9))
    assert torch.equal(one.mean, other.mean)


@pytest.mark.parametrize("renewed", [-0.1, 1.1])
def test_no_share_is_refused(renewed):
    with pytest.raises(ValueError, match="between 0 and 1"):
        build(renewed)
