"""The demo, as `make demo` runs it, for one step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).resolve().parents[2] / "examples" / "personas" / "demo.py"


def test_the_demo_trains_plots_and_shows_answers(tmp_path):
    done = subprocess.run(
        [sys.executable, DEMO, tmp_path / "run", "--steps", "1"],
        env={**os.environ, "PERSONAS_POLICY": str(tmp_path / "policy")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step   1/1" in done.stdout
    for name in ("vera", "zoe", "mara"):
        assert f"\n{name}: I love" in done.stdout
    assert done.stdout.count("before: ") == done.stdout.count("after:  ") == 3
    for product in ("checkpoint/model.safetensors", "metrics.jsonl", "rewards.png", "train.log"):
        assert (tmp_path / "run" / product).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
