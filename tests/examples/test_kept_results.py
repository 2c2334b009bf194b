"""A folder keeps results of one set of flags, and each is made once."""

import sys

import pytest

from kept_results import clear_unless_done, once, one_set_of_flags

pytestmark = pytest.mark.core


def test_a_folder_has_results_of_one_set_of_flags(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        one_set_of_flags(folder, data=tmp_path, steps=60)
    with pytest.raises(SystemExit, match=r'needs a folder with results of .*"steps": 4.* with those of .*"steps": 60'):
        one_set_of_flags(folder, data=tmp_path, steps=4)
    one_set_of_flags(folder, data=tmp_path, steps=60)


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for taken in (tmp_path, tmp_path / "notes"):
        with pytest.raises(SystemExit, match="needs a new or empty folder, or one with results, got"):
            one_set_of_flags(taken, steps=60)
    assert [*tmp_path.iterdir()] == [tmp_path / "notes"]


def test_a_command_is_run_once_and_from_the_start(tmp_path):
    folder = tmp_path / "seed-0"
    count = [sys.executable, "-c", "print(1, file=open('ran', 'a')); import sys; sys.exit(len(sys.argv) == 1)"]
    clear_unless_done(folder, "train", count)
    with pytest.raises(SystemExit, match="train failed; the reason is at the end of .*train.log"):
        once(folder, "train", count)
    for _ in range(2):
        clear_unless_done(folder, "train", [*count, "well"])
        once(folder, "train", [*count, "well"])
    assert (folder / "ran").read_text() == "1\n"
    clear_unless_done(folder, "train", [*count, "better"])  # of another command nothing is left
    assert not [*folder.iterdir()]
