"""The benchmark of elicitation runs and prints what it promises, at sizes whose times mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "elicitation_time.py"


def test_elicitation_time():
    flags = ("--pool", "50", "--users", "20", "--rewards", "3", "--repeats", "2")
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    one, all_users = lines[: lines.index([])], lines[lines.index([]) + 1 :]
    assert one[1] == ["answers", "fit", "next", "all"]
    for answers, row in zip((1, 5, 10, 20), one[2:6]):
        fit, ask, whole = map(float, row[1:])
        assert row[0] == str(answers) and min(fit, ask) >= 0
        assert whole == pytest.approx(fit + ask, abs=0.002)
    assert one[6:] == []
    assert all_users[0][:2] == ["20", "users"] and [row[0] for row in all_users[1:]] == ["10", "20"]
    assert all(float(row[1]) >= 0 for row in all_users[1:])
