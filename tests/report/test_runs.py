"""Finding runs and reading their metrics files."""

import json

import numpy as np
import pytest

from openrlhf_pgrpo.report.runs import find, read, read_runs

pytestmark = pytest.mark.core


def nan_equal(got, expected):
    np.testing.assert_array_equal(got, np.array(expected, float))


# ---- finding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(make_row, write_run):
    """A folder with three runs at different depths. Two of their folders have the same name."""
    for folder in ("all/x/run", "all/y/run", "all/d/z"):
        write_run(folder, [make_row(1, {"ann": (2, 0.0, 1.0)})])


def names(*given):
    return [name for name, _ in find(given)]


def test_a_run_is_named_after_its_folder_however_it_is_given(runs, tmp_path):
    assert names(tmp_path / "all/d/z") == names(tmp_path / "all/d/z/metrics.jsonl") == ["z"]


def test_a_run_whose_metrics_lie_deeper_is_named_after_the_folder_that_was_given(runs, tmp_path):
    assert names(tmp_path / "all/x") == ["x"]


def test_any_other_file_is_named_after_itself(runs, tmp_path):
    (tmp_path / "old.jsonl").write_text("")
    assert names(tmp_path / "old.jsonl") == ["old"]


def test_runs_below_a_folder_are_named_relative_to_it(runs, tmp_path):
    assert names(tmp_path / "all") == ["d/z", "x/run", "y/run"]


def test_equal_folder_names_are_told_apart_by_their_parents(runs, tmp_path):
    assert names(tmp_path / "all/x/run", tmp_path / "all/d/z", tmp_path / "all/y/run") == ["x/run", "z", "y/run"]


def test_a_run_given_twice_is_one_run(runs, tmp_path):
    assert names(tmp_path / "all/d/z", tmp_path / "all/d/z/metrics.jsonl") == ["z"]


def test_a_file_and_a_folder_of_one_name_still_differ(make_row, write_run, tmp_path):
    write_run("a", [make_row(1, {})])
    (tmp_path / "a.jsonl").write_text("")
    assert names(tmp_path / "a", tmp_path / "a.jsonl") == ["a", "a (2)"]


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match="needs .*, got .*/nowhere: no such path"):
        find([tmp_path / "nowhere"])


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"needs a metrics.jsonl in {tmp_path} or below it, found none"):
        find([tmp_path])


def test_no_path_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one run, got none"):
        find([])


# ---- reading --------------------------------------------------------------------------------------------------------


def test_rows_become_columns_and_what_a_step_lacks_is_nan(make_row, write_run):
    file = write_run(
        "a",
        [
            make_row(1, {"ann": (4, 1.0, 0.5), "bob": (2, -1.0, 0.0)}),
            make_row(2, {"bob": (6, 3.0, 1.0)}, more={"weight": 0.7}, loss=0.25),
        ],
    )
    run = read(file, "a")
    assert run.pref_groups == ["ann", "bob"]
    assert run.steps.tolist() == [1, 2]
    assert run.row_step.tolist() == [0, 0, 1]
    assert run.row_group.tolist() == [0, 1, 1]
    nan_equal(run.value("reward_mean"), [1, -1, 3])
    nan_equal(run.value("weight"), [np.nan, np.nan, 0.7])
    nan_equal(run.value("never heard of"), [np.nan] * 3)
    nan_equal(run.train["loss"], [np.nan, 0.25])
    assert not run.half_line and run.replaced_steps == run.not_finite == 0


@pytest.mark.parametrize("tail", ['{"step": 2, "train": {"k', '{"step": 2, "x": "\u00e4'], ids=["ascii", "letter"])
def test_half_a_last_line_is_left_out_and_remembered(make_row, write_run, tail):
    file = write_run("a", [make_row(1, {"ann": (4, 1.0, 0.5)})])
    file.write_bytes(file.read_bytes() + tail.encode()[: -1 if tail[-1] == "\u00e4" else None])
    run = read(file, "a")
    assert run.steps.tolist() == [1] and run.half_line


def test_a_whole_last_line_counts_even_without_its_newline(make_row, write_run):
    run = read(write_run("a", [make_row(1, {})], tail=json.dumps(make_row(2, {}))), "a")
    assert run.steps.tolist() == [1, 2] and not run.half_line


def test_half_a_line_in_the_middle_names_file_and_line(make_row, write_run):
    file = write_run("a", [make_row(1, {})], tail='{"step": 2, "tr\n' + json.dumps(make_row(3, {})) + "\n")
    with pytest.raises(ValueError, match=f"line 2 of {file} is not JSON"):
        read(file, "a")


@pytest.mark.parametrize(
    "row",
    [
        "[1, 2]",
        '"step"',
        '{"loss": 1}',
        '{"step": "3"}',
        '{"step": 1, "pref_groups": [1]}',
        '{"step": 1, "pref_groups": {"ann": 3}}',
        '{"step": 1, "train": [1]}',
        '{"step": 1, "samples": ["hello"]}',
        '{"step": 1, "run": "today"}',
        '{"step": 1e400}',
        f'{{"step": {10**30}}}',
    ],
)
def test_json_that_is_no_step_names_file_and_line(make_row, write_run, row):
    file = write_run("a", [make_row(1, {})], tail=row + "\n")
    with pytest.raises(ValueError, match=f"line 2 of {file} is not a training step"):
        read(file, "a")


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1'])
def test_a_file_without_a_whole_step_is_refused(write_run, content):
    file = write_run("a", [], tail=content)
    with pytest.raises(ValueError, match=f"{file} has no whole step yet"):
        read_runs([file])


def test_a_run_without_steps_beside_others_is_named_and_left_out(make_row, write_run, tmp_path):
    write_run("all/a", [make_row(1, {})])
    empty = write_run("all/b", [])
    runs, notices = read_runs([tmp_path / "all"])
    assert [run.name for run in runs] == ["a"]
    assert len(notices) == 1 and notices[0].startswith(f"{empty} has no whole step yet")


def test_numbers_that_are_not_finite_are_nan_and_counted(make_row, write_run):
    file = write_run("a", [make_row(1, {"ann": (4, float("nan"), float("inf"))}, loss=float("-inf"))])
    assert "NaN" in file.read_text() and "-Infinity" in file.read_text()
    run = read(file, "a")
    nan_equal(run.value("reward_mean"), [np.nan])
    nan_equal(run.value("reward_std"), [np.nan])
    nan_equal(run.train["loss"], [np.nan])
    assert run.not_finite == 5  # mean and std stand twice, as reward and as history, and the loss


def test_what_is_not_a_number_is_passed_over(make_row, write_run):
    row = make_row(1, {"ann": (4, 1.0, 0.5)}, more={"note": "hello", "nothing": None})
    assert not {"note", "nothing"} & set(read(write_run("a", [row]), "a").values)


def test_a_resumed_run_has_two_starts(make_row, write_run):
    rows = [
        make_row(1, {}, run={"device": "cpu", "started": 10}),
        make_row(2, {}),
        make_row(3, {}, run={"device": "gpu", "started": 99}),
    ]
    starts = read(write_run("a", rows), "a").starts
    assert starts == [(1, {"device": "cpu", "started": 10}), (3, {"device": "gpu", "started": 99})]


def test_steps_that_were_written_again_count_once_in_their_later_form(make_row, write_run):
    def row(step, mean, **more):
        sample = {"pref_group": "ann", "prompt": "p", "response": f"{mean}", "reward": mean}
        return make_row(step, {"ann": (1, mean, 0.0)}, samples=[sample], **more)

    rows = [row(1, 1.0), row(2, 2.0), row(3, 3.0, run={"device": "lost"}), row(2, 20.0), row(3, 30.0), row(4, 40.0)]
    run = read(write_run("a", rows), "a")
    assert run.steps.tolist() == [1, 2, 3, 4]
    nan_equal(run.value("reward_mean")[np.argsort(run.row_step)], [1, 20, 30, 40])
    assert run.row_step.tolist() == run.samples.step.tolist() == [0, 1, 2, 3]
    nan_equal(run.train["rollout/reward_mean"], [0.1, 0.2, 0.1 * 3, 0.4])
    assert run.starts == [] and run.replaced_steps == 2


def test_d8_a_line_of_null_is_no_step_and_blank_lines_are_none(write_run, make_row):
    file = write_run("a", [make_row(1, {})], tail="\n \n")
    assert read(file, "a").steps.tolist() == [1]
    file = write_run("b", [make_row(1, {})], tail="null\n")
    with pytest.raises(ValueError, match="line 2 of .* is not a training step"):
        read(file, "b")


def test_e4_a_report_does_not_replace_the_metrics_that_it_draws(write_run, make_row, tmp_path):
    from openrlhf_pgrpo.report import write_report

    file = write_run("a", [make_row(1, {})])
    (tmp_path / "link.html").symlink_to(file)
    for output in (file, tmp_path / "link.html"):
        with pytest.raises(ValueError, match="a report needs a file of its own, got .*, which it reads: name another"):
            write_report([file], output)
    assert read(file, "a").steps.tolist() == [1]
