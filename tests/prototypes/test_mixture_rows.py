"""What rows an online mixture takes, and what a row counts: weights, order, empty batches, rows that are no numbers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from uncollapse.prototypes.mixture import PAPER, RECOMMENDED, OnlineMixture

K, D = 12, 5
OPTIONS = [
    RECOMMENDED._asdict(),
    PAPER._asdict(),
    {"covariance": "diagonal", "balance": "sinkhorn", "temperature": None, "centred": False},
    {"covariance": "shared", "balance": "sinkhorn", "temperature": None, "centred": True},
    {"covariance": "shared", "balance": "none", "temperature": 0.1, "centred": False},
    {"covariance": "isotropic", "balance": "sinkhorn", "temperature": 0.05, "centred": True},
]


def rows(n, seed):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, D, generator=g, dtype=torch.float64), dim=-1)


def mixtures(count, options, **more):
    """Equal ones that have seen something."""
    made = []
    for _ in range(count):
        mixture = OnlineMixture(K, D, 16, **options, generator=torch.Generator().manual_seed(0), **more).double()
        for step in range(3):
            mixture.observe(rows(16, step))
        made.append(mixture)
    return made


def assert_equal_states(one, other):
    for name, value in one.state_dict().items():
        message = f"{name} differs by {float((other.state_dict()[name] - value).abs().max()):.2g}"
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-8, atol=1e-9, msg=message)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=20).filter(any),
    options=st.sampled_from(OPTIONS),
    budget=st.sampled_from([1, 1 << 28]),
    beta=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_a_row_of_weight_w_counts_as_w_rows(counts, options, budget, beta, seed):
    x, repeats = rows(len(counts), 100 + seed), torch.tensor(counts)
    weighted, repeated = mixtures(2, options, budget=budget)
    weighted.observe(x, repeats.double(), beta)
    repeated.observe(x.repeat_interleave(repeats, 0), beta=beta)
    assert_equal_states(repeated, weighted)


@settings(max_examples=20, deadline=None)
@given(options=st.sampled_from(OPTIONS), n=st.integers(1, 150), seed=st.integers(0, 99), weighted=st.booleans())
def test_the_order_of_rows_does_not_matter(options, n, seed, weighted):
    x, order = rows(n, seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    weight = torch.linspace(0, 2, n).double() if weighted else None
    one, other = mixtures(2, options, budget=1)
    one.observe(x, weight)
    other.observe(x[order], None if weight is None else weight[order])
    assert_equal_states(one, other)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_of_no_weight_may_be_anything(options):
    one, other = mixtures(2, options)
    x = rows(6, 1)
    one.observe(x)
    other.observe(torch.cat([x, torch.full((2, D), torch.nan)]), torch.tensor([1.0] * 6 + [0, 0]))
    assert_equal_states(one, other)


@pytest.mark.parametrize("x", [rows(0, 0), rows(3, 0)])
def test_nothing_seen_changes_nothing(x):
    one, other = mixtures(2, OPTIONS[0])
    one.observe(x, torch.zeros(len(x)))
    assert_equal_states(one, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_row_that_is_no_number_is_named_and_harms_nothing(options, bad):
    before, mixture = mixtures(2, options)
    mixture, before = mixture.float(), before.float()
    x = rows(6, 1).float()
    x[4, 2] = bad
    with pytest.raises(ValueError, match="row 4 of the 6 observed"):
        mixture.observe(x)
    assert_equal_states(before, mixture)


@pytest.mark.parametrize(
    ("x", "weight", "beta", "says"),
    [
        (rows(4, 0), torch.tensor([1.0, 1, -0.5, 1]), 1.0, r"weight of row 2 is -0.5"),
        (rows(4, 0), torch.tensor([1.0, torch.nan, 1, 1]), 1.0, r"weight of row 1 is nan"),
        (rows(4, 0), torch.ones(1), 1.0, r"weight must be \(4,\), one number per row, got \(1,\)"),
        (rows(4, 0), torch.ones(4, 1), 1.0, r"weight must be \(4,\)"),
        (rows(4, 0)[:, :3], None, 1.0, r"must be \(rows, 5\), got \(4, 3\)"),
        (rows(4, 0)[0], None, 1.0, r"must be \(rows, 5\), got \(5,\)"),
        (rows(4, 0), None, 0.0, "beta must be above 0"),
        (rows(4, 0), None, -1.0, "beta must be above 0"),
    ],
)
def test_what_cannot_be_observed_is_refused(x, weight, beta, says):
    before, mixture = mixtures(2, OPTIONS[0])
    with pytest.raises(ValueError, match=says):
        mixture.observe(x, weight, beta)
    assert_equal_states(before, mixture)
