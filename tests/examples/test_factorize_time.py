"""The benchmark of the command `factorize` prints what it promises, at a size whose times mean nothing."""

import subprocess
import sys

import pytest

import factorize_time

pytestmark = pytest.mark.core

SCRIPT = factorize_time.HERE / "factorize_time.py"


def run(*words):
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


def test_a_line_for_each_data_set():
    if not (factorize_time.DATA / factorize_time.STYLES).is_file():
        pytest.skip(f"needs {factorize_time.DATA / factorize_time.STYLES}")
    done = run("--only", "styles", "--rows", 60)
    assert done.returncode == 0, done.stderr
    head, line = done.stdout.splitlines()[-2:]
    assert head.split() == ["data", "rows", "texts", "wall", "s", "processor", "s"]
    name, rows, texts, wall, processor = line.split()
    assert (name, rows) == ("styles", "60") and 60 < int(texts) <= 120 and min(float(wall), float(processor)) > 1


def test_no_data_is_said(tmp_path):
    done = run("--data", tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("skipped: --only votes needs")
