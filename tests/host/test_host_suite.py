"""The host's own tests, which come with its wheel, pass with our seams in the host."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

HOST = importlib.metadata.version("openrlhf")
# How many there are, by the version of the host, counted without our seams.
TESTS = {"0.11.2": 221, "0.11.1": 63, "0.11.0": 22}
# What they load by path and we replace something of.
BY_PATH = {
    "0.11.2": {
        "datasets.utils",
        "trainer.ppo_trainer",
        "trainer.ppo_utils.experience_maker",
        "trainer.ppo_utils.samples_generator",
        "utils.agent",
    },
    "0.11.1": {"trainer.ppo_trainer", "trainer.ppo_utils.samples_generator", "utils.agent"},
    "0.11.0": {"trainer.ppo_trainer"},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `host_suite.py` says."""
    folder = tmp_path_factory.mktemp("host_suite")
    command = [sys.executable, str(Path(__file__).with_name("host_suite.py")), "report.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return {**json.loads((folder / "report.json").read_text()), "output": ended.stdout}


def test_they_all_pass_and_none_is_skipped(report):
    assert report["outcomes"] == {"passed": TESTS[HOST]}, report["output"]


def test_what_they_load_by_path_holds_our_replacements(report):
    found = {name.removeprefix("openrlhf."): loads for name, loads in report["replaced"].items()}
    by_path = {name: set(loads[-1]) for name, loads in found.items() if len(loads) > 1}
    assert by_path.keys() == BY_PATH[HOST]
    assert "RemoteExperienceMaker" in found["trainer.ppo_utils.experience_maker"][-1]
    assert "SamplesGenerator.generate_samples" in found["trainer.ppo_utils.samples_generator"][-1]
    assert "DeepspeedStrategy.save_model" in found["utils.deepspeed.deepspeed"][0]


def test_nothing_runs_without_them_and_it_would_be_seen(report):
    assert report["stock"] == [] and report["planted"] == ["openrlhf.datasets.utils"]
