"""A frozen and a trained reward model judge the same unseen statements; a second call only reports."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reproduce" / "pref_votes.py"


def test_both_models_judge_unseen_statements(chat_policy, polis, tmp_path):
    words = [tmp_path / "run", "--data", polis, "--policy", chat_policy, "--seeds", 1, "--epochs", 1, "--factors", 1]
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    said, table = first.stdout.splitlines()[:-4], first.stdout.splitlines()[-4:]
    assert [line.split()[1] for line in said if line.startswith("seed-0: ")] == [
        "pairs-train", "pairs-judge", "frozen", "trained", "frozen-judges", "trained-judges",
    ]  # fmt: skip
    assert [line.split()[0] for line in table] == ["accuracy", "frozen", "trained", "gain"]
    frozen, trained, gain = (float(line.split()[1]) for line in table[1:])
    assert 0 <= frozen <= 1 and abs(trained - frozen - gain) < 0.002

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines() == table, again.stdout + again.stderr
