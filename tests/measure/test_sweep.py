"""The spanning tree and the complete sweep against brute force and against the counts one ε at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

from layouts import EPS, planted
from uncollapse.measure.sweep import complete_sweep
from uncollapse.measure.unique import components, no_neighbour, unique_prototypes
from uncollapse.neighbours import spanning_tree as spanning
from uncollapse.neighbours.spanning_tree import spanning_tree

EPSILONS = (0.001, 0.0125, 0.025, 0.1, 0.25, 0.5, 0.9, 1.5)


def cloud(rows: int, dim: int, centres: int, noise: float, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(centres, dim, generator=rng)
    w = base[torch.randint(centres, (rows,), generator=rng)]
    return w + noise * torch.randn(rows, dim, generator=rng) * (torch.rand(rows, 1, generator=rng) < 0.7)


CLOUDS = [(1, 3, 1, 0.1), (2, 3, 2, 0.1), (3, 1, 3, 0.0), (300, 8, 300, 0.1), (900, 16, 40, 0.05), (2500, 32, 1, 0.1)]


def brute_lengths(w: torch.Tensor) -> np.ndarray:
    x = w.double() / w.double().norm(dim=1, keepdim=True)
    return np.sort(minimum_spanning_tree((3 - x @ x.T).numpy()).data - 2)  # the solver takes 0 for no edge


@pytest.mark.parametrize(("rows", "dim", "centres", "noise"), CLOUDS)
def test_tree_and_sweep_are_exact(rows, dim, centres, noise):
    w = cloud(rows, dim, centres, noise, 0)
    tree = spanning_tree(w)
    if rows > 1:
        assert np.abs(tree.lengths - brute_lengths(w)).max() < tree.slack
    found = complete_sweep(w, EPSILONS, tree)
    assert found.unique == {e: unique_prototypes(w, e) for e in EPSILONS}
    assert found.components == {e: components(w, e) for e in EPSILONS}
    assert found.no_neighbour == {e: no_neighbour(w, e) for e in EPSILONS}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 80), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_small_clouds_with_exact_copies(rows, dim, centres, seed):
    w = cloud(rows, dim, centres, 0.3, seed)
    w = w[w.abs().amax(1) > 0]
    if not len(w):
        return
    found = complete_sweep(w, (0.025, 0.3))
    assert found.unique == {e: unique_prototypes(w, e) for e in (0.025, 0.3)}
    assert found.components == {e: components(w, e) for e in (0.025, 0.3)}
    assert found.no_neighbour == {e: no_neighbour(w, e) for e in (0.025, 0.3)}


def test_pairs_at_the_threshold_are_compared_again():
    """Distances within the rounding of float32 around ε, on both sides of it: the tree cannot decide these."""
    rng = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=rng, dtype=torch.float64))[0]
    rows = []
    for i in range(0, 40, 2):
        cos = 1 - EPS * (1 + (1e-9 if i % 4 else -1e-9))
        rows += [axes[i], cos * axes[i] + (1 - cos * cos) ** 0.5 * axes[i + 1]]
    w = torch.stack(rows)
    found = complete_sweep(w, [EPS])
    assert (found.unique[EPS], found.components[EPS], found.no_neighbour[EPS]) == (30, 30, 20)


def test_planted_counts():
    p = planted(distinct=9, copies=60, outside=3, chains=4)
    found = complete_sweep(p.w, [EPS])
    assert found.unique == {EPS: p.unique}
    assert found.components == {EPS: p.components}
    assert found.no_neighbour == {EPS: p.no_neighbour}
    assert p.components < p.unique  # the chains tell the two apart


@pytest.mark.parametrize("panel", [7, 64])
def test_block_sizes_change_nothing(panel, monkeypatch):
    w = cloud(700, 12, 60, 0.05, 1)
    expected = complete_sweep(w, EPSILONS)
    monkeypatch.setattr(spanning, "_PANEL", panel)
    monkeypatch.setattr(spanning, "_FIRST_PANEL", 5)
    monkeypatch.setattr(spanning, "_TILE", 33)
    monkeypatch.setattr(spanning, "_PIVOTS", 3)
    monkeypatch.setattr(spanning, "_BUFFER", 500)
    assert complete_sweep(w, EPSILONS) == expected


def test_a_bfloat16_product_changes_nothing(monkeypatch):
    w = cloud(700, 32, 60, 0.05, 2)
    expected = complete_sweep(w, EPSILONS)
    product = "uncollapse.neighbours.close_pairs.Rows.product"
    monkeypatch.setattr(product, lambda self, a, b: a.bfloat16().float() @ b.bfloat16().float().T)
    monkeypatch.setattr("uncollapse.neighbours.close_pairs.rounding", lambda dim: 2.0**-6)
    assert complete_sweep(w, EPSILONS) == expected


def test_memory_stays_far_below_k_by_k():
    torch.manual_seed(0)
    import tracemalloc

    w = torch.randn(6000, 16)
    tracemalloc.start()
    spanning_tree(w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6000 * 6000 * 4 / 2


def test_bad_input():
    with pytest.raises(ValueError, match="zero or non-finite"):
        spanning_tree(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\(0, 2\]"):
        complete_sweep(torch.eye(3), [0.0])


@pytest.mark.gpu
def test_the_gpu_counts_what_the_cpu_counts():
    w = cloud(3000, 32, 200, 0.05, 3)
    assert complete_sweep(w.cuda(), EPSILONS) == complete_sweep(w, EPSILONS)
