"""The learning rate as a table."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import STYLES, learning_rate

# 10 steps, peak 1, 20 % warm-up, ratio 0.1: steps 0 and 1 warm up, step s decays by (s - 2)/8.
TABLES = {
    "constant": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1, 0.1],
    # 0.1 + 0.9 (1 + cos(pi k / 8)) / 2, with cos 22.5 = 0.92388, cos 45 = 0.70711, ...
    "cosine": [
        *(0.5, 1, 1, 0.965746, 0.868198, 0.722208),
        *(0.55, 0.377792, 0.231802, 0.134254, 0.1, 0.1),
    ],
    # 0.1^(k/8): 0.749894, 0.562341, ...
    "exponential": [
        *(0.5, 1, 1, 0.749894, 0.562341, 0.421697),
        *(0.316228, 0.237137, 0.177828, 0.133352, 0.1, 0.1),
    ],
}


@pytest.mark.parametrize("style", STYLES)
def test_the_table(style):
    rates = [learning_rate(step, 10, 1.0, 0.2, style, 0.1) for step in range(12)]
    assert rates == pytest.approx(TABLES[style], abs=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_the_peak_is_a_factor(style):
    for step in range(12):
        one = learning_rate(step, 10, 1.0, 0.2, style, 0.1)
        assert learning_rate(step, 10, 8e-4, 0.2, style, 0.1) == pytest.approx(8e-4 * one)


def test_warm_up_by_hand():
    rates = [learning_rate(step, 400, 8e-4, 0.01, "linear", 0.01) for step in range(6)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4])
    assert rates[5] == pytest.approx(8e-4 * (1 - 0.99 / 396))


@pytest.mark.parametrize(("warmup", "wanted"), [(0.07, 7), (0.14, 14), (0.55, 55), (0.071, 8)])
def test_the_share_is_exact(warmup, wanted):
    """In floating point 0.07 * 100 is a little more than 7: no eighth step comes of that."""
    rates = [learning_rate(step, 100, 1.0, warmup, "linear", 0.01) for step in range(100)]
    assert rates.index(1.0) == wanted - 1


@pytest.mark.parametrize("style", STYLES)
def test_without_warm_up_the_first_step_is_the_peak(style):
    assert learning_rate(0, 10, 0.3, 0.0, style, 0.1) == 0.3


def test_the_decay_ends_with_this_run():
    for steps in (1, 7, 100, 12345):
        last = learning_rate(steps - 1, steps, 1.0, 0.0, "linear", 0.0)
        assert last == pytest.approx(1 / steps)
        assert learning_rate(steps, steps, 1.0, 0.0, "linear", 0.0) == 0


@given(
    steps=st.integers(1, 5000),
    warmup=st.floats(0, 1),
    style=st.sampled_from(STYLES),
    ratio=st.just(0.0) | st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
def test_positive_in_every_step_and_never_above_the_peak(steps, warmup, style, ratio, share):
    if style == "exponential":
        ratio = max(ratio, 1e-6)
    for step in {0, int(share * (steps - 1)), steps - 1}:
        assert 0 < learning_rate(step, steps, 1.0, warmup, style, ratio) <= 1
    for step in (steps, steps + 1, 2 * steps, 1000 * steps):
        assert ratio * (1 - 1e-9) <= learning_rate(step, steps, 1.0, warmup, style, ratio) <= 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ratio", [0.001, 0.5, 1.0])
def test_it_rises_then_falls(style, ratio):
    rates = [learning_rate(step, 200, 1.0, 0.13, style, ratio) for step in range(300)]
    top = math.ceil(0.13 * 200) - 1
    assert rates[top] == 1
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))
    assert rates[-1] == pytest.approx(1 if style == "constant" else ratio)


@pytest.mark.parametrize(
    ("style", "warmup", "ratio", "named"),
    [
        ("step", 0.1, 0.1, "'step'.*constant, linear, cosine, exponential"),
        ("linear", -0.1, 0.1, "warmup.*-0.1"),
        ("linear", 1.1, 0.1, "warmup.*1.1"),
        ("linear", 0.1, -0.1, "ratio.*-0.1"),
        ("cosine", 0.1, 1.1, "ratio.*1.1"),
        ("exponential", 0.1, 0, "above 0.*0"),
        ("linear", math.nan, 0.1, "warmup.*nan"),
        ("linear", 0.1, math.nan, "ratio.*nan"),
    ],
)
def test_numbers_that_cannot_be(style, warmup, ratio, named):
    with pytest.raises(ValueError, match=named):
        learning_rate(0, 10, 1.0, warmup, style, ratio)
