"""The arithmetic, with the sums of each expectation beside it."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.history import Moments
from openrlhf_pgrpo.report import numbers
from openrlhf_pgrpo.report.runs import read
from openrlhf_pgrpo.report.samples import before_after
from openrlhf_pgrpo.report.selection import DRAWN, LISTED, POINTS, make_view

pytestmark = pytest.mark.core
NAN = float("nan")


@pytest.fixture
def run_of(make_row, write_run):
    """A run from a dict for each step: preference group -> (samples, mean, std)."""
    return lambda *steps: read(write_run("a", [make_row(i + 1, step) for i, step in enumerate(steps)]), "a")


def test_summary_pools_all_samples_of_a_quarter(run_of):
    empty = {"bob": (1, 0.0, 0.0)}
    # Eight steps: quarters of two. Rewards of ann: 0 and 2, then 4 (first quarter); 10 and 10, then 4 and 8 (last).
    run = run_of(
        {"ann": (2, 1.0, 1.0)},
        {"ann": (1, 4.0, 0.0)},
        empty,
        empty,
        empty,
        empty,
        {"ann": (2, 10.0, 0.0)},
        {"ann": (2, 6.0, 2.0)},
    )
    summary, ann = numbers.summarise(run), 0
    assert summary.quarter == 2
    # first: mean (0 + 2 + 4) / 3 = 2, M2 4 + 0 + 4 = 8; last: mean (10 + 10 + 4 + 8) / 4 = 8, M2 4 + 4 + 16 + 0 = 24
    assert (summary.first.count[ann], summary.first.mean[ann], summary.first.m2[ann]) == (3, 2, 8)
    assert (summary.last.count[ann], summary.last.mean[ann], summary.last.m2[ann]) == (4, 8, 24)
    # standard errors sqrt(8/2) / sqrt(3) and sqrt(24/3) / sqrt(4); change 8 - 2
    assert numbers.standard_error(summary.first)[ann] == pytest.approx((4 / 3) ** 0.5)
    assert numbers.standard_error(summary.last)[ann] == pytest.approx(2**0.5)
    assert summary.change[ann] == 6
    assert summary.error[ann] == pytest.approx((4 / 3 + 2) ** 0.5)
    # all 7 rewards: mean 38 / 7, squares 0 + 4 + 16 + 100 + 100 + 16 + 64 = 300, variance 300 / 7 - (38 / 7)^2
    std = (300 / 7 - (38 / 7) ** 2) ** 0.5
    assert summary.gain[ann] == pytest.approx(6 / std)
    assert summary.gain_error[ann] == pytest.approx((4 / 3 + 2) ** 0.5 / std)
    # 7 of 7 + 4 samples
    assert summary.samples.tolist() == [7, 4] and summary.share[ann] == pytest.approx(7 / 11)


def test_a_single_sample_has_a_mean_and_no_error(run_of):
    """Its spread is unknown, and not 0."""
    step = {"ann": (1, 1.0, 0.0), "bob": (4, 0.0, 1.0)}
    summary = numbers.summarise(run_of(step, {"ann": (4, 3.0, 1.0), "bob": (4, 0.0, 0.0)}))
    assert summary.change.tolist() == [2, 0]
    np.testing.assert_array_equal(numbers.standard_error(summary.first), [NAN, (4 / 3) ** 0.5 / 2])
    assert np.isnan(summary.error[0]) and np.isnan(summary.gain_error[0]) and np.isfinite(summary.gain[0])
    assert summary.error[1] == pytest.approx((1 / 3) ** 0.5)  # constant rewards have an error, 0


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10])
def test_a_gain_does_not_depend_on_the_unit_of_rewards(run_of, scale):
    steps = [
        {"ann": (4, scale * step, 0.1 * scale), "bob": (4, scale * (100 + step), 0.1 * scale)} for step in range(4)
    ]
    gain = numbers.summarise(run_of(*steps)).gain
    assert gain == pytest.approx([3 / (1.25 + 0.01) ** 0.5] * 2)


def test_a_preference_group_missing_in_a_quarter_has_no_change(run_of):
    both = {"ann": (9, 1.0, 1.0), "bob": (9, 0.0, 1.0)}
    summary = numbers.summarise(run_of(both, both, both, {"ann": (9, 2.0, 1.0)}))
    assert np.isnan(summary.change[1]) and np.isnan(summary.gain[1])
    assert summary.change[0] == 1


def test_one_step_is_no_change(run_of):
    summary = numbers.summarise(run_of({"ann": (9, 1.0, 1.0), "bob": (9, 0.0, 1.0)}))
    assert np.isnan(summary.change).all() and summary.worst is None


def test_a_step_with_nan_counts_for_nothing(run_of):
    summary = numbers.summarise(run_of({"ann": (3, 1.0, 0.0)}, {"ann": (9, NAN, 1.0)}, {"ann": (5, 4.0, 0.0)}))
    assert summary.whole.count[0] == 8 and summary.samples[0] == 17  # it had samples all the same
    assert summary.whole.mean[0] == pytest.approx((3 * 1 + 5 * 4) / 8)


def test_worst_is_the_least_gain_in_own_standard_deviations_not_the_lowest_mean_or_change(run_of):
    # ann: from 100 to 150, std about 100: gains about 0.5. bob: from -5 to -3, std about 1: gains about 1.4.
    run = run_of({"ann": (9, 100.0, 100.0), "bob": (9, -5.0, 1.0)}, {"ann": (9, 150.0, 100.0), "bob": (9, -3.0, 1.0)})
    summary = numbers.summarise(run)
    assert summary.change.tolist() == [50, 2]
    assert run.pref_groups[summary.worst] == "ann"
    assert run.pref_groups[summary.lowest] == "bob"


def test_few_samples_make_nobody_worst_while_others_have_enough(run_of):
    low, high = {"bob": (8, 0.0, 1.0), "ann": (7, 5.0, 1.0)}, {"bob": (8, 1.0, 1.0), "ann": (7, 0.0, 1.0)}
    run = run_of(low, high)
    assert run.pref_groups[numbers.summarise(run).worst] == "bob"
    few = run_of({"bob": (2, 0.0, 1.0), "ann": (2, 5.0, 1.0)}, {"bob": (2, 1.0, 1.0), "ann": (2, 0.0, 1.0)})
    assert few.pref_groups[numbers.summarise(few).worst] == "ann"


def test_constant_rewards_have_no_gain_and_nobody_alone_is_worst(run_of):
    rounded = 0.1 + 1e-16
    run = run_of({"ann": (9, 0.1, 0.0), "bob": (9, 0.0, 1.0)}, {"ann": (9, rounded, 0.0), "bob": (9, 1.0, 1.0)})
    assert rounded != 0.1
    summary = numbers.summarise(run)
    assert np.isnan(summary.gain[0]) and np.isfinite(summary.gain[1])
    assert summary.worst is None


def test_gains_are_measured_from_the_first_quarter_in_own_std(run_of):
    run = run_of({"ann": (4, 1.0, 2.0)}, {"ann": (4, 1.0, 2.0)}, {"ann": (4, 1.0, 2.0)}, {"ann": (4, 1.0, 2.0)})
    shifted = numbers.gains(run_of({"ann": (1, 1.0, 1.0)}, {"ann": (1, 5.0, 1.0)}), numbers.summarise(run))
    assert shifted.tolist() == [(1 - 1) / 2, (5 - 1) / 2]


def test_bins_are_equally_filled_and_drawn_at_their_middle_step():
    bin_of, x = numbers.bin_steps(np.arange(10, 20), 4)
    assert bin_of.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert x.tolist() == [11, 13, 16, 18]


def test_few_steps_are_not_binned():
    bin_of, x = numbers.bin_steps(np.array([3, 5, 9]), 1000)
    assert bin_of.tolist() == [0, 1, 2] and x.tolist() == [3, 5, 9]


def test_bins_of_preference_groups_weigh_by_samples(run_of):
    run = run_of({"ann": (1, 0.0, 0.0), "bob": (5, 9.0, 0.0)}, {"ann": (3, 4.0, 2.0)}, {"bob": (2, 1.0, 0.0)})
    values, std = run.value("reward_mean"), run.value("reward_std")
    moments = numbers.bin_groups(run, values, std, np.array([-1, 0]), np.array([0, 0, 1]))
    # ann in the first bin: (0 + 3 * 4) / 4 = 3, M2 = 1 * 3^2 + 3 * (2^2 + 1^2) = 24; never in the second; -1 is nobody
    assert moments.count.tolist() == [[0, 0], [4, 0]]
    assert moments.mean[1, 0] == 3 and moments.m2[1, 0] == 24


def test_running_mean_and_std_are_those_of_the_samples_in_the_window():
    rng = np.random.default_rng(0)
    samples = [rng.normal(1e6, 1, size) for size in (3, 1, 4, 2, 5)]
    columns = [[[f(one) for one in samples]] for f in (len, np.mean, lambda one: len(one) * np.var(one))]
    mean, std = numbers.running(Moments(*map(np.array, columns)), 3)
    for place in range(5):
        near = np.concatenate(samples[max(place - 1, 0) : place + 2])
        assert mean[0, place] == pytest.approx(near.mean(), abs=1e-8)
        assert std[0, place] == pytest.approx(near.std(), abs=1e-6)


def test_one_huge_reward_costs_other_windows_no_digits():
    """Differences of sums over all steps would lose what the huge one rounds away."""
    mean = np.full((3, 300), 0.5)
    mean[:, 0] = [1e5, 1e12, -1e30]
    moments = Moments(np.full(mean.shape, 4.0), mean, np.full(mean.shape, 1.0))
    smooth, std = numbers.running(moments, 7)
    assert smooth[:, 4:] == pytest.approx(0.5, rel=1e-12) and std[:, 4:] == pytest.approx(0.5, rel=1e-12)
    assert smooth[:, 3] == pytest.approx(mean[:, 0] / 7, rel=1e-4)
    assert numbers.running_sum(mean, 3)[:, 2:-1] == pytest.approx(1.5, rel=1e-12)


def test_running_mean_is_nan_where_nobody_is_near():
    moments = Moments(np.array([[1.0, 0, 0, 0]]), np.array([[7.0, 0, 0, 0]]), np.zeros((1, 4)))
    mean, _ = numbers.running(moments, 3)
    np.testing.assert_array_equal(mean, [[7, 7, NAN, NAN]])


def test_quantiles_are_over_preference_groups_by_their_means(run_of):
    # Bin 0: means a (1 * 0 + 3 * 4) / 4 = 3, b 5, c 13; d is not asked for. Bin 1: nobody. Bin 2: b alone.
    run = run_of(
        {"a": (1, 0.0, 0.0), "b": (9, 5.0, 0.0), "d": (9, -50.0, 0.0)},
        {"a": (3, 4.0, 0.0), "c": (1, 13.0, 0.0)},
        {"d": (1, 1.0, 0.0)},
        {"b": (1, 8.0, 0.0)},
    )
    among = np.array([name != "d" for name in run.pref_groups])
    band = numbers.quantile_band(run, run.value("reward_mean"), among, np.array([0, 0, 1, 2]))
    np.testing.assert_allclose(band[:, 0], np.quantile([3, 5, 13], [0.1, 0.5, 0.9]))
    assert np.isnan(band[:, 1]).all()
    assert band[:, 2].tolist() == [8, 8, 8]


def test_an_evaluation_weighs_by_its_own_pairs(make_row, write_run):
    """Also of a preference group that is not in the batch of that step."""
    rows = [make_row(step, {"ann": (8, 0.0, 1.0)}) for step in (1, 2)]
    rows[0]["pref_groups"]["ann"] |= {"eval_loss": 1.0, "eval_pairs": 10.0, "eval_accuracy": 0.5}
    rows[0]["pref_groups"]["bob"] = {"eval_loss": 5.0, "eval_pairs": 30.0}
    rows[1]["pref_groups"]["ann"] |= {"eval_loss": 2.0, "eval_pairs": 30.0}
    rows[1]["pref_groups"]["bob"] = {"eval_loss": 3.0}
    run = read(write_run("a", rows), "a")

    def mean(key):
        weight, both = numbers.weight_of(run, key), np.zeros(2, int)
        moments = numbers.bin_groups(run, run.value(key), None, np.array([0, 1]), both, weight)
        return moments.mean[:, 0].tolist()

    assert mean("eval_loss") == pytest.approx([(10 * 1 + 30 * 2) / 40, (30 * 5 + 3) / 31])
    assert mean("eval_pairs") == [20, 30] and mean("eval_accuracy") == [0.5, 0]
    np.testing.assert_array_equal(numbers.weight_of(run, "reward_mean"), [8, NAN, 8, NAN])
    band = numbers.quantile_band(
        run, run.value("eval_loss"), np.array([False, True]), np.array([0, 1]), numbers.weight_of(run, "eval_loss")
    )
    assert band[1].tolist() == [5, 3]


def test_differing_names_what_is_not_the_same_everywhere():
    one = {"same": 1, "lr": 1e-5, "nan": NAN, "flag": True}
    two = {"same": 1, "lr": 2e-5, "nan": NAN, "flag": 1, "new": "x"}
    assert numbers.differing([one, two]) == [("lr", [1e-5, 2e-5]), ("flag", [True, 1]), ("new", [None, "x"])]


# ---- which preference groups are drawn, on how many points ----------------------------------------------------------


def test_many_preference_groups_are_cut_to_the_worst_and_the_largest(run_of):
    count = 200
    first = {f"u{i:03d}": (1000 - i, 0.0, 1.0) for i in range(count)}
    last = {f"u{i:03d}": (1000 - i, 0.0 if i in (150, 160, 170, 180) else 1.0, 1.0) for i in range(count)}
    view = make_view([run_of(first, last)])
    largest = [f"u{i:03d}" for i in range(DRAWN - 4)]
    assert view.drawn == [*largest, "u150", "u160", "u170", "u180"]
    assert len(view.listed) == LISTED and set(view.drawn) <= set(view.listed) and view.total == count
    assert view.listed[:4] == ["u150", "u160", "u170", "u180"]
    assert view.runs[0].others.sum() == count - DRAWN


def test_a_run_without_a_drawn_preference_group_loses_nobody_else(make_row, write_run):
    def run(*names):
        rewards = {name: (99 if name == "u00" else 9, 0.0, 1.0) for name in names}
        return read(write_run("a", [make_row(1, rewards)]), "a")

    names = [f"u{i:02d}" for i in range(20)]
    view = make_view([run(*names), run(*names[1:])])
    assert view.drawn == names[:DRAWN] and view.runs[1].groups[0] == -1
    assert view.runs[1].others.sum() == 20 - DRAWN


def test_a_preference_group_has_one_colour_in_all_runs(make_row, write_run):
    rows = [{"bob": (9, 0.0, 1.0)}, {"ann": (9, 0.0, 1.0), "bob": (9, 0.0, 1.0)}]
    runs = [read(write_run(f"{i}", [make_row(1, row)]), f"{i}") for i, row in enumerate(rows)]
    view = make_view(runs)
    assert view.drawn == ["ann", "bob"]
    assert view.runs[0].groups.tolist() == [-1, 0] and view.runs[1].groups.tolist() == [0, 1]
    assert view.colour("ann") != view.colour("bob")


def test_many_steps_are_drawn_on_at_most_a_thousand_points(run_of):
    run = run_of(*[{"ann": (1, 0.0, 0.0)}] * (3 * POINTS))
    assert len(make_view([run]).runs[0].x) == POINTS
    assert [len(view.x) for view in make_view([run, run]).runs] == [POINTS // 2] * 2


# ---- before and after -----------------------------------------------------------------------------------------------


@pytest.fixture
def answers(make_row, write_run):
    """(step, prompt, response) of each answer of ann, read back as [(early, late)]."""

    def answers(*given, owner="ann", steps=8):
        rows = []
        for step in range(1, steps + 1):
            samples = [
                {"pref_group": owner, "prompt": prompt, "response": response, "reward": step}
                for at, prompt, response in given
                if at == step
            ]
            other = {"pref_group": "bob", "prompt": "other", "response": "other", "reward": 0.0}
            rows.append(make_row(step, {"ann": (1, 0.0, 0.0)}, samples=[other, *samples]))
        pairs = before_after(read(write_run("a", rows), "a"), owner)
        return [tuple(one and (one.step, one.prompt, one.response) for one in pair) for pair in pairs]

    return answers


def test_pairs_are_of_the_same_prompt_from_both_halves(answers):
    early = (1, "p", "a"), (2, "q", "b"), (3, "p", "c"), (4, "r", "d")
    got = answers(*early, (5, "p", "e"), (7, "p", "f"), (8, "x", "g"))
    assert got == [((1, "p", "a"), (7, "p", "f"))]


def test_at_most_two_pairs_are_shown(answers):
    got = answers(*[(step, prompt, "") for step in (1, 8) for prompt in "pqr"])
    assert got == [((1, "p", ""), (8, "p", "")), ((1, "q", ""), (8, "q", ""))]


def test_without_a_common_prompt_they_are_the_earliest_and_the_latest(answers):
    got = answers((1, "p", "a"), (2, "q", "b"), (3, "r", "c"), (6, "s", "d"), (8, "t", "e"))
    assert got == [((1, "p", "a"), (6, "s", "d")), ((2, "q", "b"), (8, "t", "e"))]


def test_a_single_answer_has_no_partner_and_nobody_has_none(answers):
    assert answers((3, "p", "a")) == [((3, "p", "a"), None)]
    assert answers() == []


def test_samples_without_a_preference_group_are_kept(answers):
    assert answers((1, "p", "a"), (8, "p", "b"), owner=None) == [((1, "p", "a"), (8, "p", "b"))]


def test_a_file_that_was_replaced_meanwhile_is_refused(make_row, write_run):
    sample = {"pref_group": "ann", "prompt": "p", "response": "r", "reward": 1.0}
    run = read(write_run("a", [make_row(i, {"ann": (1, 0.0, 0.0)}, samples=[sample]) for i in (1, 2)]), "a")
    write_run("a", [make_row(1, {})])
    with pytest.raises(ValueError, match="was replaced while it was read"):
        before_after(run, "ann")
