"""Asks the live actors what our hooks did. A patch that reaches only the driver would look the same there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

OWN, HOSTS = "openrlhf_pgrpo.cli.train_ppo_ray", "openrlhf.cli.train_ppo_ray"


@pytest.fixture
def found_behind(tiny, host_copy, tmp_path):
    """What a probe finds in the live actors of sync and async training, and in the parser."""

    def ask(door):
        argv = {
            "--advantage_estimator": "pgrpo",
            "--data.pref_group_key": "persona",
            "--actor.model_name_or_path": tiny / "model",
            "--data.prompt_dataset": tiny / "prompts.jsonl",
            "--data.label_key": "answer",
            "--reward.remote_url": tiny / "reward.py",
            "--rollout.n_samples_per_prompt": 2,
            "--vllm.num_engines": 1,
            "--train.batch_size": 8,
            "--train.micro_batch_size": 4,
            "--rollout.micro_batch_size": 4,
            "--rollout.batch_size": 4,
        }
        words = [str(word) for pair in argv.items() for word in pair] + ["--train.async_enable"]
        file = tmp_path / f"{door}.json"
        command = [sys.executable, Path(__file__).parent / "probe.py", file, door, *words]
        environment = {**os.environ, **host_copy.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(file.read_text())

    return ask


def test_both_doors_give_the_same_parser_and_the_same_classes_in_the_live_actors(found_behind, host_copy):
    found = found_behind(OWN)
    expected = {
        "maker": "openrlhf_pgrpo.host.ppo.experience_maker.PreferenceExperienceMaker",
        "estimator": "PGRPO",
        "logs through": "StepLog.step",
        "checkpoints through": "openrlhf_pgrpo.host.ppo.checkpoints",
        "prompt": "TaggedPrompt",
        "pref_groups": ["ann", "bob", "cleo/3"],
    }
    assert found["sync"] == found["async"] == expected
    assert sum(options[0].startswith("--pgrpo.") for options, *_ in found["parser"] if options) > 7

    assert host_copy.command("patch").returncode == 0
    assert found_behind(HOSTS) == found
