"""Unique prototypes against float64 brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.measure import unique
from uncollapse.measure.unique import (
    EPSILONS,
    components,
    cosine_argmax,
    epsilon_sweep,
    greedy_cover,
    nearest_kept,
    no_neighbour,
    unique_prototypes,
)
from uncollapse.neighbours import close_pairs as rows
from uncollapse.neighbours.close_pairs import Rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unit64(w: torch.Tensor) -> np.ndarray:
    x = w.double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def brute_greedy(w: torch.Tensor, eps: float) -> list[int]:
    x = unit64(w)
    near, kept = 1 - x @ x.T < eps, []
    for k in range(len(x)):
        if not near[k, kept].any():
            kept.append(k)
    return kept


def brute_adjacency(w: torch.Tensor, eps: float) -> np.ndarray:
    x = unit64(w)
    near = 1 - x @ x.T < eps
    np.fill_diagonal(near, False)
    return near


def brute_components(w: torch.Tensor, eps: float) -> int:
    near, seen, count = brute_adjacency(w, eps), set(), 0
    for k in range(len(near)):
        if k in seen:
            continue
        count, stack = count + 1, [k]
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack += np.flatnonzero(near[i]).tolist()
    return count


def at_distance(a: torch.Tensor, eps: float, rng: torch.Generator) -> torch.Tensor:
    """A unit vector at cosine distance eps from the unit vector a."""
    b = torch.randn(a.shape, generator=rng, dtype=torch.float64)
    b -= (b @ a) * a
    b /= b.norm()
    cos = 1 - eps
    return cos * a + (1 - cos * cos) ** 0.5 * b


@st.composite
def planted(draw: st.DrawFn) -> tuple[torch.Tensor, float]:
    """Rows with copies, scaled copies, negatives, and neighbours on both sides of eps, in a random order."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    eps, dim = draw(st.sampled_from(EPSILONS)), draw(st.sampled_from([2, 3, 8, 33]))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        a = torch.randn(dim, generator=rng, dtype=torch.float64)
        a /= a.norm()
        rows.append(a)
        for _ in range(draw(st.integers(0, 4))):
            kind = draw(st.sampled_from(["copy", "scaled", "negative", "closer", "farther", "barely", "chain"]))
            if kind == "copy":
                rows.append(a.clone())
            elif kind == "scaled":
                rows.append(a * draw(st.sampled_from([1e-3, 0.5, 40.0])))
            elif kind == "negative":
                rows.append(-a)
            elif kind == "chain":
                rows.append(at_distance(rows[-1] / rows[-1].norm(), 0.9 * eps, rng))
            else:
                offset = {"closer": -1e-3, "farther": 1e-3, "barely": draw(st.sampled_from([-1e-8, 1e-8]))}
                rows.append(at_distance(a, eps + offset[kind], rng))
    w = torch.stack(rows)
    if draw(st.booleans()):
        w = torch.where(w.abs() < 0.1, draw(st.sampled_from([0.0, -0.0])), w)
        w[w.abs().amax(1) == 0] = 1.0
    return w[torch.randperm(len(w), generator=rng)], eps


@settings(max_examples=150, deadline=None)
@given(planted(), st.sampled_from(DTYPES), st.sampled_from([None, 1, 2, 5, 1000]))
def test_greedy_is_the_definition(case: tuple[torch.Tensor, float], dtype: torch.dtype, block: int | None) -> None:
    w, eps = case[0].to(dtype), case[1]
    kept = greedy_cover(w, eps, block=block)
    assert kept.dtype == torch.long
    assert kept.tolist() == brute_greedy(w, eps)
    assert epsilon_sweep(w, [eps])[eps] == unique_prototypes(w, eps) == len(kept)


@settings(max_examples=75, deadline=None)
@given(planted(), st.sampled_from(DTYPES))
def test_countings_agree_with_brute_force(case: tuple[torch.Tensor, float], dtype: torch.dtype) -> None:
    w, eps = case[0].to(dtype), case[1]
    assert components(w, eps) == brute_components(w, eps) <= unique_prototypes(w, eps)
    assert no_neighbour(w, eps) == int((~brute_adjacency(w, eps).any(1)).sum())


@settings(max_examples=75, deadline=None)
@given(planted())
def test_nearest_kept_is_the_argmax(case: tuple[torch.Tensor, float]) -> None:
    w, eps = case
    kept = greedy_cover(w, eps)
    nearest = nearest_kept(w, kept)
    x = unit64(w)
    cos = x @ x[kept.numpy()].T
    expected = kept.numpy()[(cos >= cos.max(1, keepdims=True) - 1e-12).argmax(1)]
    expected[kept.numpy()] = kept.numpy()
    assert nearest.tolist() == expected.tolist()
    assert (1 - (x * x[nearest.numpy()]).sum(1) < eps + 1e-12).all()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and prefix bounds at sizes that brute force still reaches."""
    for module, name, value in [
        (unique, "_SMALL", 64),
        (unique, "_BLOCK", 96),
        (unique, "TILE", 80),
        (unique, "rows_at_once", lambda *_, **__: 40),
        (rows, "TILE", 80),
        (rows, "rows_at_once", lambda *_, **__: 40),
        (rows, "_PREFIX_FROM", 128),
    ]:
        monkeypatch.setattr(module, name, value)


def clusters(k: int, centres: int, dim: int, spread: float, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    middle = torch.nn.functional.normalize(torch.randn(centres, dim, generator=rng), dim=1)
    noise = spread * torch.rand(k, 1, generator=rng) * torch.randn(k, dim, generator=rng)
    return middle[torch.randint(centres, (k,), generator=rng)] + noise


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("eps", [*EPSILONS, 1.0])
@pytest.mark.parametrize(("centres", "spread"), [(1, 0.0), (1, 0.01), (20, 0.02), (300, 0.05), (700, 0.2)])
def test_tiled_path_is_the_definition(eps: float, centres: int, spread: float) -> None:
    w = clusters(700, centres, 64, spread, seed=3)
    expected = brute_greedy(w, eps)
    assert greedy_cover(w, eps).tolist() == expected
    assert greedy_cover(w, eps, block=33).tolist() == expected
    assert epsilon_sweep(w, [eps]) == {eps: len(expected)}
    assert components(w, eps) == brute_components(w, eps)
    assert no_neighbour(w, eps) == int((~brute_adjacency(w, eps).any(1)).sum())


@pytest.mark.usefixtures("small_tiles")
def test_prefix_bound_is_used_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(700, 128, generator=torch.Generator().manual_seed(0))
    w[350:] = w[:350] + 0.05 * w[350:]
    assert Rows(w).prefix(0.025) is not None
    with_bound = greedy_cover(w, 0.025)
    monkeypatch.setattr(rows, "_PREFIX_FROM", 10**9)
    assert Rows(w).prefix(0.025) is None
    assert with_bound.tolist() == greedy_cover(w, 0.025).tolist() == brute_greedy(w, 0.025)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("few", [0, 10**9])
def test_candidates_one_by_one_or_by_tiles(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    w = clusters(700, 300, 64, 0.05, seed=5)
    monkeypatch.setattr(unique, "_FEW_ROWS", few)
    monkeypatch.setattr(unique, "_FEW_EACH", few)
    assert greedy_cover(w, 0.025).tolist() == brute_greedy(w, 0.025)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("seed", range(5))
def test_prefix_bounds_every_cosine(seed: int) -> None:
    """Also for rows that the prefix holds whole, where nothing is left but rounding."""
    w = clusters(500, 200, 64, 0.02 * seed, seed) @ torch.diag(torch.logspace(0, -seed, 64))
    found = Rows(w).prefix(0.025)
    assert found is not None
    bound = found.double() @ found.double().T
    assert (bound.numpy() >= unit64(w) @ unit64(w).T - 1e-7).all()


@pytest.mark.parametrize("eps", [0.025, 0.1, 0.5])
def test_prefix_is_chosen_on_rows_that_did_not_give_its_basis(eps: float) -> None:
    """Chosen on its own sample, a short prefix looks good enough at any eps; then every tile is computed twice."""
    w = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    found = Rows(w).prefix(eps)
    passed = 1.0 if found is None else float((found[:500] @ found[500:1500].T >= 1 - eps).float().mean())
    assert (found is None) if eps == 0.5 else (passed < 1e-4)


def test_chain_is_one_component_and_many_unique() -> None:
    angle = torch.arange(20, dtype=torch.float64) * 0.2  # neighbours at 1 - cos(.2) = .0199
    w = torch.stack([angle.cos(), angle.sin()], 1)
    assert components(w, 0.025) == 1
    assert unique_prototypes(w, 0.025) == 10
    assert no_neighbour(w, 0.025) == 0


def test_order_decides_which_is_kept() -> None:
    angle = torch.tensor([0.0, 0.2, 0.4])
    w = torch.stack([angle.cos(), angle.sin()], 1)
    assert greedy_cover(w, 0.025).tolist() == [0, 2]
    assert greedy_cover(w[[1, 0, 2]], 0.025).tolist() == [0]


def test_threshold_is_strict() -> None:
    assert unique_prototypes(torch.eye(5), 1.0) == 5  # at exactly 1.0: not redundant
    assert unique_prototypes(torch.eye(5), 1.001) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_rows_are_not_rounded_again(dtype: torch.dtype) -> None:
    w = clusters(600, 200, 48, 0.03, seed=1).to(dtype)
    assert greedy_cover(w, 0.025).tolist() == greedy_cover(w.double(), 0.025).tolist()


def test_huge_and_tiny_rows() -> None:
    w = torch.tensor([[1e300, 0.0], [1e-300, 1e-300], [0.0, 1e-310]], dtype=torch.float64)
    assert greedy_cover(w, 0.025).tolist() == [0, 1, 2]
    assert unique_prototypes(torch.tensor([[1e-300, 1e-300], [1e300, 1e300]], dtype=torch.float64)) == 1


def test_huge_and_tiny_rows_in_float32() -> None:
    w = torch.tensor([[3e38, 3e38, 0.0], [1e-44, 1e-44, 0.0], [0.0, 1e-40, 0.0], [1e-25, 0.0, 1e-25]])
    assert greedy_cover(w, 0.025).tolist() == [0, 2, 3]
    for bad in (math.inf, math.nan):
        with pytest.raises(ValueError, match=r"1 zero or non-finite rows \(first: 1\)"):
            unique_prototypes(torch.tensor([[1.0, 2.0], [1.0, bad]]))


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this torch cannot reduce the precision of CPU products",
)
def test_reduced_precision_products_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = clusters(900, 300, 64, 0.03, seed=2)
    z = clusters(200, 50, 64, 0.5, seed=4)
    expected, chosen = brute_greedy(w, 0.025), (unit64(z) @ unit64(w).T).argmax(1).tolist()
    # Not every CPU takes the setting's offer, so the products are rounded here.
    monkeypatch.setattr(Rows, "product", lambda self, a, b: a.bfloat16().float() @ b.bfloat16().float().T)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert greedy_cover(w, 0.025).tolist() == expected
        assert cosine_argmax(z, w).tolist() == chosen
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_kept_copies_map_to_themselves() -> None:
    w = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.1]])
    assert nearest_kept(w, torch.tensor([1, 0, 2])).tolist() == [0, 1, 2, 1]


def test_autocast_and_gradients_change_nothing() -> None:
    w = clusters(300, 100, 32, 0.05, seed=5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept = greedy_cover(w, 0.1)
        chosen = cosine_argmax(w, w)
    assert kept.tolist() == brute_greedy(w.detach(), 0.1)
    assert chosen.tolist() == list(range(300))
    assert not kept.requires_grad
    assert w.grad is None


def test_nothing_is_written_to_the_input() -> None:
    w = clusters(300, 30, 16, 0.05, seed=6)
    before = w.clone()
    kept = greedy_cover(w, 0.1)
    nearest_kept(w, kept), components(w, 0.1), epsilon_sweep(w)
    assert torch.equal(w, before)


def test_argmax_ties_go_to_the_first_whatever_the_block() -> None:
    w = clusters(40, 40, 16, 0.0, seed=7)
    w = torch.cat([w, 4 * w, w])  # every prototype three times
    z = torch.randn(101, 16, generator=torch.Generator().manual_seed(8))
    x, y = unit64(z), unit64(w[:40])
    expected = (x @ y.T).argmax(1).tolist()
    for block in (None, 1, 7, 64):
        assert cosine_argmax(z, w, block).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_changes_nothing() -> None:
    w = clusters(5000, 900, 64, 0.05, seed=9)
    for eps in EPSILONS:
        kept = greedy_cover(w.cuda(), eps)
        assert kept.is_cuda
        assert kept.tolist() == greedy_cover(w, eps).tolist()
        assert nearest_kept(w.cuda(), kept).tolist() == nearest_kept(w, kept.cpu()).tolist()
        assert components(w.cuda(), eps) == components(w, eps)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (
            torch.tensor([[1.0, 0.0], [0.0, 0.0], [float("nan"), 1.0]]),
            r"2 zero or non-finite rows \(first: 1, 2\)",
        ),
        (torch.tensor([[1.0, float("inf")]]), r"1 zero or non-finite rows \(first: 0\)"),
        (torch.ones(3, 2, dtype=torch.long), "floating"),
        (torch.ones(3), "floating"),
        (torch.ones(0, 3), "non-empty"),
    ],
)
def test_bad_rows_are_named(w: torch.Tensor, message: str) -> None:
    for function in (greedy_cover, components, no_neighbour, unique_prototypes):
        with pytest.raises(ValueError, match=message):
            function(w, 0.1)
    with pytest.raises(ValueError, match=message):
        epsilon_sweep(w)


@pytest.mark.parametrize("eps", [0.0, -0.1, 2.1, float("nan")])
def test_bad_eps(eps: float) -> None:
    for function in (greedy_cover, components, no_neighbour):
        with pytest.raises(ValueError, match="eps is a cosine distance"):
            function(torch.eye(3), eps)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="block must be at least 1"):
        greedy_cover(torch.eye(3), 0.1, block=0)
    with pytest.raises(ValueError, match="kept must list"):
        nearest_kept(torch.eye(3), torch.tensor([3]))
    with pytest.raises(ValueError, match="kept must list"):
        nearest_kept(torch.eye(3), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="same space"):
        cosine_argmax(torch.ones(2, 4), torch.eye(3))
