"""The benchmark of the fast path runs and prints what it promises, at a size whose times mean nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "factorization_time.py"


def test_factorization_time():
    command = [sys.executable, SCRIPT, "--largest", "10000", "--factors", "2", "--l2", "3", "--choice", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines, empty, choice = done.stdout.splitlines()
    assert not empty and re.fullmatch(
        r"choice among 200 users of four pairs each: [1-8] base rewards, .* seconds", choice
    )
    assert head.split() == "annotations users seconds data MB peak MB agreement".split()
    rows = [[float(number) for number in line.split()] for line in lines]
    assert [row[:2] for row in rows] == [[10_000, 100], [10_000, 1000]]
    for _, _, seconds, before, peak, agreement in rows:
        assert seconds > 0 and 30 < before <= peak < 2000
        assert 0.52 < agreement < 1  # better than a coin, whose error here is 0.002
