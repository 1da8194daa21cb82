import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uncollapse.schedules import cosine, linear, linear_epochs


@given(total=st.integers(2, 500), warmup=st.integers(0, 100), start=st.floats(1e-6, 10), end=st.floats(0, 10))
def test_cosine_equals_a_list_built_point_by_point(total, warmup, start, end):
    warmup = min(warmup, total - 1)
    ramp = [start * i / max(1, warmup - 1) for i in range(warmup)]
    n = total - warmup
    curve = [end + 0.5 * (start - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)]
    assert [cosine(s, total, start, end, warmup) for s in range(total)] == pytest.approx(ramp + curve)


def test_cosine_ends():
    assert cosine(0, 100, 1.0, 0.0, warmup=10) == 0
    assert cosine(9, 100, 1.0, 0.0, warmup=10) == 1
    assert cosine(10, 100, 1.0, 0.0, warmup=10) == 1
    assert cosine(100, 100, 1.0, 0.25) == pytest.approx(0.25)


def test_linear_is_a_straight_line():
    assert [linear(s, 5, 0.99, 1.0) for s in range(7)] == pytest.approx([0.99, 0.992, 0.994, 0.996, 0.998, 1.0, 1.0])


def test_temperature_warms_up_by_epoch():
    values = [linear_epochs(e, 0.04, 0.07, 4) for e in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert linear_epochs(0, 0.04, 0.04, 0) == 0.04
