"""The benchmarks of `examples/benchmarks` run and print what they promise, at sizes whose times mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def rows(script, *flags):
    """The tables that a benchmark prints: a list of lines, each a list of the words in its columns."""
    command = [sys.executable, FOLDER / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def numbers(rows, first):
    """Columns, as numbers, of the only line that begins with the words `first`."""
    first = [str(word) for word in first]
    (found,) = [row[len(first) :] for row in rows if row[: len(first)] == first]
    return [float(text) for text in found]


def test_estimator_time():
    printed = rows("estimator_time.py", "--largest", "1000", "--repeats", "1")
    for pref_groups in (10, 100):
        alone = numbers(printed[: printed.index([])], (1000, pref_groups))
        assert len(alone) == 4 + 4 and min(alone) > 0
    whole = numbers(printed[printed.index([]) :], (1000, 100))
    assert len(whole) == 3 + 2 and min(whole) > 0

    columns = {"pgrpo": 4, "pgrpo_eb": 7}  # float64 per preference group; its saved name comes in addition
    memory = numbers(printed[-1:], (1000,))
    for held, after_ten_times_the_samples, saved in (memory[:3], memory[3:]):
        assert held > saved
        assert after_ten_times_the_samples == pytest.approx(held, rel=0.1)
    name = sum(len(f"preference group {g}") for g in range(1000)) / 1000 + 4
    assert [memory[2], memory[5]] == [pytest.approx(8 * count + name, abs=1) for count in columns.values()]


def test_long_run():
    printed = rows("long_run.py", "--steps", "300", "--pref-groups", "50", "--each", "4")
    assert [row[0] for row in printed[-2:]] == ["resume", "report"]
    assert all(float(row[1]) >= 0 and float(row[2]) < 100 for row in printed[-2:])


def test_history_file():
    printed = rows("history_file.py", "--pref-groups", "1000", "--repeats", "1")
    for name in ("pgrpo", "pgrpo_eb"):
        *parts, saving, loading, megabytes = numbers(printed, (name,))
        assert len(parts) == 5 and min(parts) >= 0
        assert saving == pytest.approx(sum(parts[:3]), abs=0.002)
        assert loading == pytest.approx(sum(parts[3:]), abs=0.002)
        assert 0.03 < megabytes < 0.2


def test_group_weights():
    printed = rows("group_weights.py", "--largest", "100", "--repeats", "1")
    for pref_groups in (10, 100):
        times = numbers(printed, (pref_groups,))
        assert len(times) == 5 and min(times) >= 0
