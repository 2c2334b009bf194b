"""What our hooks did, asked of the live actors: in the driver, a patch that reaches nobody else looks as good."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_sync_and_async_trainers_hold_our_parts(tiny):
    probe = Path(__file__).parent / "probe.py"
    argv = {
        "--advantage_estimator": "pgrpo",
        "--pgrpo.group_key": "persona",
        "--actor.model_name_or_path": tiny / "model",
        "--data.prompt_dataset": tiny / "prompts.jsonl",
        "--data.label_key": "answer",
        "--reward.remote_url": tiny / "reward.py",
        "--rollout.n_samples_per_prompt": 2,
        "--train.batch_size": 8,
        "--rollout.batch_size": 4,
    }
    words = [str(word) for pair in argv.items() for word in pair]
    done = subprocess.run([sys.executable, probe, *words, "--train.async_enable"], capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")] or [done.stdout + done.stderr]
    expected = {
        "maker": "openrlhf_pgrpo.host.experience_maker.PreferenceExperienceMaker",
        "estimator": "PGRPO",
        "logs through": "_log",
        "checkpoints through": "openrlhf_pgrpo.host.checkpoints",
        "prompt": "TaggedPrompt",
        "pref_groups": ["ann", "bob", "cleo/3"],
    }
    assert json.loads(line.removeprefix("FOUND ")) == {"sync": expected, "async": expected}
