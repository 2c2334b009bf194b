"""The content of the figures, before a browser draws them."""

import numpy as np
import pytest

from openrlhf_pgrpo.report import evaluation, figures
from openrlhf_pgrpo.report.runs import read
from openrlhf_pgrpo.report.selection import BAND_POINTS, make_view

pytestmark = pytest.mark.core
ANN, BOB = (9, 0.0, 1.0), (27, 2.0, 1.0)


@pytest.fixture
def view_of(make_row, write_run):
    """A list of steps for each run. A step is a dict: preference group -> (samples, mean, std)."""

    def view_of(*runs, **more):
        rows = [[make_row(i + 1, step, **more) for i, step in enumerate(steps)] for steps in runs]
        return make_view([read(write_run(f"{i}", steps), f"{i}") for i, steps in enumerate(rows)])

    return view_of


def lines(figure):
    return {trace.name: trace for trace in figure.data if trace.name}


def test_a_figure_has_a_line_per_preference_group_and_run_of_one_colour_and_different_dashes(view_of):
    data = figures.metric(view_of([{"ann": ANN, "bob": BOB}] * 2, [{"bob": BOB}] * 2), "advantage_std").data
    assert [(line.name, line.meta) for line in data] == [("ann", "0"), ("bob", "0"), ("bob", "1")]
    assert data[1].line.color == data[2].line.color != data[0].line.color
    assert data[1].line.dash != data[2].line.dash
    assert [line.showlegend for line in data] == [True, True, False]


def test_what_gained_least_is_thick_and_named(view_of):
    view = view_of([{"ann": ANN, "bob": ANN}, {"ann": ANN, "bob": BOB}])
    drawn = lines(figures.gain_over_steps(view))
    assert drawn["ann · gained least"].line.width > drawn["bob"].line.width


def test_shares_are_of_all_samples_and_absent_is_not_zero(view_of):
    view = view_of([{"ann": ANN, "bob": BOB}], [{"bob": BOB}])
    shares = [(line.name, line.y.tolist()) for line in figures.share(view).data]
    assert shares == [("ann", [25.0]), ("bob", [75.0]), ("bob", [100.0])]  # 9 and 27 of 36


def test_a_state_is_drawn_as_recorded_and_only_where_a_step_has_it(view_of):
    view = view_of([{"ann": ANN}, {"bob": BOB}, {"ann": BOB}])
    np.testing.assert_array_equal(lines(figures.state(view, "history_mean"))["ann"].y, [0, np.nan, 2])


def test_a_single_point_is_drawn_too(view_of):
    drawn = lines(figures.state(view_of([{"ann": ANN, "bob": BOB}, {"ann": ANN}]), "history_mean"))
    assert (drawn["ann"].mode, drawn["bob"].mode) == ("lines", "markers")


def test_a_panel_has_a_dot_a_step_a_running_mean_and_the_spread_around_it(view_of):
    view = view_of([{"ann": (1, 0.0, 3.0)}, {"bob": BOB}, {"ann": (3, 4.0, 1.0)}])
    low, high, dots, line = figures.reward_panel(view, "ann").data
    assert dots.x.tolist() == [1, 3] and dots.y.tolist() == [0, 4] and dots.customdata.tolist() == [1, 3]
    # one window over all: mean (0 + 3 * 4) / 4 = 3; variance (1 * (3^2 + 3^2) + 3 * (1^2 + 1^2)) / 4 = 6
    assert line.y.tolist() == [3, 3, 3]
    np.testing.assert_allclose([low.y, high.y], [[3 - 6**0.5] * 3, [3 + 6**0.5] * 3], rtol=1e-6)


def test_an_evaluation_is_drawn_of_all_preference_groups_in_it(make_row, write_run):
    """Most of them are in the evaluation, not in the batch of that step."""
    names = [f"g{i:02d}" for i in range(15)]
    rows = [make_row(1, {name: (30 - i, 0.0, 0.0) for i, name in enumerate(names)}), make_row(2, {"g00": ANN})]
    for i, name in enumerate(names):
        rows[1]["pref_groups"].setdefault(name, {}).update(eval_pairs=50.0, eval_loss=0.1 * i)
    drawn = lines(figures.metric(make_view([read(write_run("a", rows), "a")]), "eval_loss"))
    assert [drawn[name].y[1] for name in names[:12]] == pytest.approx([0.1 * i for i in range(12)])
    assert drawn["3 others"].y[1] == pytest.approx(1.3)


def test_an_error_is_shown_where_there_is_one(view_of):
    """A single sample has none, and neither a bar nor ± behind it."""
    one, many = (1, 0.0, 0.0), (1, 2.0, 0.0)
    (dots,) = figures.gain_from_first_to_last(view_of([{"ann": one, "bob": BOB}, {"ann": many, "bob": ANN}])).data
    errors = dict(zip(dots.text, zip(dots.error_x.array, dots.customdata)))
    assert np.isnan(errors["ann"][0]) and errors["ann"][1] == ""
    assert errors["bob"][0] > 0 and errors["bob"][1] == f" ± {errors['bob'][0]:.2f}"
    assert "%{customdata}" in dots.hovertemplate and "error_x" not in dots.hovertemplate


def test_an_evaluation_page_shows_an_error_where_there_is_one():
    """One person alone has none."""
    one, many = {"value": 0.5, "error": None}, {"value": 0.75, "error": 0.125}
    who = {"groups": {"ann": {"accuracy": one}, "bob": {"accuracy": many}}}
    for trace in evaluation.groups({evaluation.OWN: who, evaluation.SHARED: who}).figure.data:
        assert list(trace.customdata) == ["", " ± 0.125"] and "%{x:.3f}%{customdata}" in trace.hovertemplate
    after = [
        {"answers": answers, "people": 3, "by information": {"all": {"accuracy": measure}}}
        for answers, measure in ((0, one), (5, many))
    ]
    trace = evaluation.asked({"after": after}, "accuracy").figure.data[0]
    assert list(trace.text) == ["", " ± 0.125"] and "%{y:.3f}%{text}" in trace.hovertemplate


def test_all_others_are_a_band_and_a_median(view_of):
    steps = [{f"u{i:03d}": (9, float(i), 1.0) for i in range(112)}] * 200
    low, high, median, *drawn = figures.metric(view_of(steps), "reward_mean").data
    assert len(drawn) == 12 and median.name == "100 others" and len(median.x) == BAND_POINTS
    others = np.array([i for i in range(112) if f"u{i:03d}" not in {line.name.split(" ")[0] for line in drawn}])
    for trace, quantile in ((low, 0.1), (median, 0.5), (high, 0.9)):
        np.testing.assert_allclose(trace.y, np.quantile(others, quantile), rtol=1e-6)


def test_a_resume_is_marked_where_it_happened(make_row, write_run):
    record = {"started": 0, "settings": {}}
    rows = [make_row(step, {"ann": ANN}, run=record if step in (1, 3) else None) for step in (1, 2, 3)]
    figure = figures.metric(make_view([read(write_run("a", rows), "a")]), "reward_mean")
    assert [shape.x0 for shape in figure.layout.shapes] == [3]


def test_a_train_metric_is_drawn_as_recorded_and_smoothed(view_of):
    raw, smooth = figures.train_panel(view_of([{"ann": ANN}] * 3), "rollout/reward_mean").data
    np.testing.assert_allclose(raw.y, [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(smooth.y, [0.2, 0.2, 0.2], rtol=1e-6)
    assert raw.opacity < smooth.opacity


def test_times_of_runs_are_their_means(view_of):
    view = view_of([{"ann": ANN}] * 2, [{"ann": ANN}], **{"timing/ppo_train": 3.0})
    bars = lines(figures.timing_by_run(view))
    assert list(bars["generation"].x) == [2, 2] and list(bars["training"].x) == [3, 3]


@pytest.mark.parametrize(
    "name, shown",
    [
        ("ann", "ann"),
        ("a\n b", "a b"),
        ("", "''"),
        (" ", "' '"),
        ("a<b>&c", "a&lt;b&gt;&amp;c"),
        ("$x$ %{y}", "&#36;x&#36; &#37;{y}"),
        ("0123456789" * 3, "01234567890123456…23456789"),
    ],
)
def test_a_label_is_the_name_letter_for_letter(name, shown):
    assert figures.label(name) == shown
