"""What prototypes carry, against definitions written out by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.measure.geometry import alignment, effective_rank, uniformity
from uncollapse.measure.information import view_information
from uncollapse.measure.usage import (
    effective_prototypes,
    prototype_argmax,
    prototype_report,
    unique_among_used,
    usage_counts,
    used_prototypes,
)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T


def brute_merge(w: torch.Tensor, eps: float) -> list[int]:
    cos, kept = cosines(w, w), []
    for k in range(len(w)):
        if all(1 - cos[k, j] >= eps for j in kept):
            kept.append(k)
    return [k if k in kept else max(kept, key=lambda j: cos[k, j]) for k in range(len(w))]


def prototypes(seed: int, k: int = 60, dim: int = 12) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=rng)
    return centres[torch.randint(20, (k,), generator=rng)] + 0.15 * torch.randn(k, dim, generator=rng)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1, 13]))
def test_argmax_is_of_the_raw_cosine(seed: int, block: int | None) -> None:
    w = prototypes(seed) * torch.rand(60, 1, generator=torch.Generator().manual_seed(seed)).add(0.1)
    z = torch.randn(50, 12, generator=torch.Generator().manual_seed(seed + 1))
    assert prototype_argmax(z, w, block).tolist() == cosines(z, w).argmax(1).tolist()


def test_counts() -> None:
    counts = usage_counts(torch.tensor([3, 0, 3, 3]), 5)
    assert counts.tolist() == [1, 0, 0, 3, 0]
    assert used_prototypes(counts) == 2
    for bad in ([5], [-1]):
        with pytest.raises(ValueError, match=r"outside \[0, 5\)"):
            usage_counts(torch.tensor(bad), 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.025, 0.1, 0.5]))
def test_effective_is_the_definition(seed: int, eps: float) -> None:
    w = prototypes(seed)
    argmax = torch.randint(30, (200,), generator=torch.Generator().manual_seed(seed))
    to = brute_merge(w, eps)
    moved = [to[k] for k in argmax.tolist()]
    shares = [c / 200 for c in Counter(moved).values()]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    counts = usage_counts(argmax, len(w))
    assert effective_prototypes(counts, w, eps) == pytest.approx(expected, rel=1e-9)
    assert 1 <= expected <= used_prototypes(counts) + 1e-9


def test_unique_prototypes_that_nobody_uses_count_for_nothing() -> None:
    w = torch.cat([torch.eye(8), torch.eye(8)[:1]])  # 8 distinct, the last a copy of the first
    counts = torch.tensor([5, 0, 0, 0, 0, 0, 0, 0, 5])
    assert unique_among_used(w, counts, 0.025) == 1
    assert effective_prototypes(counts, w, 0.025) == pytest.approx(1.0)
    assert effective_prototypes(torch.tensor([4, 4, 4, 4, 0, 0, 0, 0, 0]), w, 0.025) == pytest.approx(4.0)
    assert unique_among_used(w, torch.zeros(9, dtype=torch.long)) == 0


def test_bad_counts() -> None:
    with pytest.raises(ValueError, match="one per prototype"):
        effective_prototypes(torch.ones(3, dtype=torch.long), torch.eye(4))
    with pytest.raises(ValueError, match="one per prototype"):
        unique_among_used(torch.eye(4), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="not all zero"):
        effective_prototypes(torch.zeros(4, dtype=torch.long), torch.eye(4))


@pytest.mark.parametrize("shape", [(100, 6), (6, 100)])
def test_effective_rank(shape: tuple[int, int]) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, shape[1])
    s = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert effective_rank(z) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert effective_rank(1e-30 * z) == pytest.approx(effective_rank(z), rel=1e-5)


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.eye(7).repeat(3, 1)) == pytest.approx(7.0)
    assert effective_rank(torch.ones(9, 5)) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="all zero"):
        effective_rank(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        effective_rank(torch.tensor([[1.0, float("nan")]]))


def test_uniformity() -> None:
    z = torch.randn(700, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    expected = torch.pdist(unit).pow(2).mul(-2).exp().mean().log()
    assert uniformity(z) == pytest.approx(float(expected), rel=1e-9)
    assert uniformity(3 * z, max_points=300) == pytest.approx(float(expected), rel=0.05)
    assert uniformity(z, max_points=300) == uniformity(z, max_points=300)
    assert uniformity(torch.ones(10, 3)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="zero row"):
        uniformity(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least 2"):
        uniformity(torch.ones(1, 3))


def test_report_puts_the_numbers_together() -> None:
    rng = torch.Generator().manual_seed(0)
    w, z = prototypes(1), torch.randn(300, 12, generator=rng)
    z_views = z + 0.3 * torch.randn(3, 300, 12, generator=rng)
    z_fit = torch.randn(200, 12, generator=rng) + 0.3 * torch.randn(2, 200, 12, generator=rng)
    report = prototype_report(w, z, z_views, z_fit, epsilons=(0.1, 0.5))
    counts = torch.from_numpy(np.bincount(cosines(z, w).argmax(1), minlength=60))
    assert (report.prototypes, report.n) == (60, 300)
    assert report.used == int((counts > 0).sum())
    for eps in (0.1, 0.5):
        assert report.unique[eps] == len(set(brute_merge(w, eps)))
        assert report.unique_used[eps] == len(set(brute_merge(w[counts > 0], eps)))
        assert report.effective[eps] == pytest.approx(effective_prototypes(counts, w, eps))
    assert report.view_information.bits == view_information(z_views, w, z_fit).bits
    assert report.effective_rank == pytest.approx(effective_rank(z))
    assert report.uniformity == pytest.approx(uniformity(z))
    assert set(report.unique) == {0.1, 0.5}


def test_report_without_views_and_bad_input() -> None:
    w, z = prototypes(1), torch.randn(5, 12)
    assert prototype_report(w, z).view_information is None
    assert prototype_report(w, z[:1]).uniformity is None
    with pytest.raises(ValueError, match="views of the same images"):
        prototype_report(w, z, torch.randn(2, 4, 12))
    with pytest.raises(ValueError, match="epsilons is empty"):
        prototype_report(w, z, epsilons=())


def test_alignment():
    z = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert alignment(torch.stack([z, 3 * z])) == pytest.approx(0, abs=1e-6)
    assert alignment(torch.stack([z, -z])) == pytest.approx(4)
    three = torch.stack([z, z.roll(1, 0), z.roll(2, 0)])
    pairs = [(three[a] - three[b]).square().sum(1).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert alignment(three) == pytest.approx(float(sum(pairs) / 3), rel=1e-5)
    with pytest.raises(ValueError, match="views"):
        alignment(z[None])
