"""Win rates and their intervals, by hand."""

import math

import numpy as np
import pytest

from openrlhf_pgrpo.core.win_rate import win_rate

pytestmark = pytest.mark.core


def test_a_tie_is_half_a_win_and_the_interval_is_wilsons():
    found = win_rate(["A", "A", "tie", "B"], ["p", "q", "r", "s"])
    assert found.rate == (1 + 1 + 0.5 + 0) / 4 and found.prompts == 4
    # residuals .375, .375, -.125, -.625: squares .140625, .140625, .015625, .390625 add up to .6875
    # V = 4/3 * .6875 / 16 = .0572917;  n = .625 * .375 / V = 4.090909;  t of 3 degrees of freedom 3.182446
    n, z = 0.625 * 0.375 / (4 / 3 * 0.6875 / 16), 3.182446305284263
    centre = (0.625 + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(0.625 * 0.375 / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert 0 < found.low < 0.25 and 0.9 < found.high < 1


def test_rows_of_one_prompt_are_one_unit():
    """Each prompt three times, all alike, tells as much as once."""
    verdicts, prompts = ["A", "A", "tie", "B"], ["p", "q", "r", "s"]
    assert win_rate(verdicts * 3, prompts * 3) == pytest.approx(win_rate(verdicts, prompts))
    apart = win_rate(verdicts * 3, range(12))
    assert apart.high - apart.low < win_rate(verdicts, prompts).high - win_rate(verdicts, prompts).low


def test_prompts_weigh_by_their_rows():
    # scores 1, 1, 1 of p and 0 of q: the rate of rows is 3/4
    found = win_rate(["A", "A", "A", "B"], ["p", "p", "p", "q"])
    assert found.rate == 0.75 and found.prompts == 2 and found.low < 0.1 and found.high > 0.95


def test_where_all_prompts_agree_the_interval_is_no_point():
    for verdict, rate in (("A", 1.0), ("B", 0.0), ("tie", 0.5)):
        few, many = win_rate([verdict] * 5, range(5)), win_rate([verdict] * 500, range(500))
        assert few.rate == many.rate == rate and few.low <= rate <= few.high
        assert many.high - many.low < 0.1 < 0.3 < few.high - few.low
    # n = P = 5 and t = 2.776445: of five wins the lower end is 1 / (1 + t^2 / 5)
    assert win_rate(["A"] * 5, range(5)).low == pytest.approx(1 / (1 + 2.7764451051977987**2 / 5))


def test_the_other_policy_has_the_mirror_image():
    one, other = win_rate(["A", "A", "tie", "B"], range(4)), win_rate(["B", "B", "tie", "A"], range(4))
    assert (other.rate, other.low, other.high) == pytest.approx((1 - one.rate, 1 - one.high, 1 - one.low))


def test_one_prompt_has_no_interval_and_none_no_rate():
    one, none = win_rate(["A", "B"], ["p", "p"]), win_rate([], [])
    assert one.rate == 0.5 and math.isnan(one.low) and math.isnan(one.high) and one.prompts == 1
    assert math.isnan(none.rate) and none.prompts == 0


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_about_95_of_100_intervals_hold_the_truth(rate):
    """Of 20 prompts with four rows each, which agree more than chance would have it."""
    rng, prompts = np.random.default_rng(0), np.repeat(np.arange(20), 4)
    held = []
    for _ in range(400):
        chances = np.repeat(rng.beta(2 * rate, 2 * (1 - rate), 20), 4)
        found = win_rate(np.where(rng.random(80) < chances, "A", "B").tolist(), prompts.tolist())
        held.append(found.low <= rate <= found.high)
    assert 0.92 < np.mean(held) < 0.99
