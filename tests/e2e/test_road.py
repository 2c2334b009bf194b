"""The whole road on a tiny policy, as `make road` walks it: real commands, Ray, vLLM and DeepSpeed."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.profiles import Profile
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "road" / "road.py"


@pytest.fixture
def ratings(tmp_path):
    """Twenty people, half of whom like long responses, the others short ones."""
    rng, path = random.Random(0), tmp_path / "ratings.csv"
    responses = [f"{word * size} {end}" for word in "abcde" for size in (1, 4, 9) for end in ("land", "sea")]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "prompt", "response", "rating"])
        for user in range(20):
            sign = 1 if user % 2 else -1
            rows = [(response, sign * len(response) + rng.gauss(0, 1)) for response in responses]
            writer.writerows([f"u{user}", f"what of {user % 3}?", *row] for row in rows)
    return path


def test_from_ratings_to_a_stranger(chat_policy, ratings, tmp_path):
    folder = tmp_path / "road"
    words = [folder, "--data", ratings, "--policy", chat_policy, "--steps", 2, "--pairs", 20]
    command = [sys.executable, SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 people of" in done.stdout and "the stranger's own mean rating of what was put first" in done.stdout
    assert "[pgrpo] step 2  100%" in done.stdout

    def rows(name):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    known, new = ({row["user"] for row in rows(name)} for name in ("pairs.jsonl", "strangers.jsonl"))
    assert len(known) == 14 and len(new) == 6 and not known & new
    assert {row["pref_group"] for row in rows("grouped.jsonl")} == {"group-1", "group-2"}
    comparison = json.loads((folder / "comparison" / "result.json").read_text())
    assert set(comparison["pref_groups"]) == {"group-1", "group-2"} and comparison["all"]["prompts"] == 3
    model = load(folder / "reward-model")
    profile = Profile.load(folder / "stranger.json", model.fingerprint, Prior.of(model.coefficients))
    assert profile.user in new and len(profile.answers) == 10
    # What ranks the slates is the reward of the profile, as everywhere else.
    slate = rows("served-stranger.jsonl")[0]
    rewards = model.base_rewards([slate["prompt"]] * 4, slate["responses"]) @ profile.coefficients
    assert slate["rewards"] == pytest.approx(rewards.tolist(), abs=1e-4)
    page = (folder / "road.html").read_text()
    assert page.count("<h2>") == 10 and "openrlhf-pgrpo elicit" in page and "<svg" in page

    # The same call again does nothing again.
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("(done before)") == 10, again.stdout + again.stderr
