"""The trials that kill parts of runs: what is planned, and one that is made, kept, and not made again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kills

pytestmark = pytest.mark.host

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def run(*words):
    return subprocess.run([sys.executable, FOLDER / "kills.py", *map(str, words)], capture_output=True, text=True)


def test_the_plan_covers_all_and_kills_at_least_fifty_times():
    trials = kills.plan(kills.TRIALS, seed=0)
    cases = {(kind, victim) for kind, victims in kills.VICTIMS.items() for victim in victims}
    assert {(one.kind, one.victim) for one in trials} == cases and kills.VICTIMS.keys() == kills.RUNS.keys()
    assert sum(one.victim not in kills.ALSO for one in trials) >= 50
    assert trials == kills.plan(kills.TRIALS, seed=0)
    assert {one.seed for one in trials}.isdisjoint(one.seed for one in kills.plan(kills.TRIALS, seed=1))


def test_what_differs_in_two_states_is_named():
    import numpy as np
    import torch

    state = {"weights": [torch.ones(2)], "history": {"seen": np.arange(3)}, "step": 4}
    assert kills.difference(state, {**state, "weights": [torch.ones(2)]}) == ""
    assert kills.difference(state, {**state, "weights": [torch.ones(2).double()]}) == "state.weights.0"
    assert kills.difference(state, {**state, "history": {"seen": np.arange(4)}}) == "state.history.seen"
    assert kills.difference(state, {"weights": state["weights"], "history": state["history"]}) == "state.step"


def test_a_trial_is_made_kept_and_not_made_again(tmp_path):
    first = run(tmp_path, "--only", "rerank", "--trials", "3")
    (file,) = (tmp_path / "outcomes").iterdir()
    outcome = json.loads(file.read_text())
    assert (outcome["kind"], outcome["victim"]) == ("rerank", "writer") and outcome["recovered"] > 0
    failed = outcome["outcome"] == "failed"  # what a kill leaves depends on the moment
    assert first.returncode == failed == any((tmp_path / "trials").iterdir()), first.stdout + first.stderr
    assert f"| rerank | writer | 1 | 1 {outcome['outcome']} |" in first.stdout

    file.write_text(json.dumps(outcome | {"outcome": "failed", "said": "needs none of it"}))
    again = run(tmp_path, "--only", "rerank", "--trials", "3")
    assert again.returncode == 1 and "needs none of it" in again.stdout
    assert "| rerank | writer | 1 | 1 failed |" in again.stdout

    other = run(tmp_path, "--only", "rerank", "--trials", "3", "--seed", "1")
    assert other.returncode == 1 and "needs a folder with trials of the same plan" in other.stderr


def test_what_is_refused(tmp_path):
    done = run(tmp_path / "none", "--only", "nobody")
    assert done.returncode == 2 and "needs at least one trial, got none" in done.stderr
    assert not (tmp_path / "none").exists()
