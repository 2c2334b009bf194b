"""Made-up runs to report on."""

import json

import pytest


@pytest.fixture
def make_row():
    """One line of a metrics file: `rewards` maps a preference group to (samples, mean, std)."""

    def make_row(step, rewards, samples=None, run=None, more=None, **train):
        total = sum(count for count, _, _ in rewards.values())
        row = {
            "step": step,
            "time": 1_800_000_000 + 60 * step,
            "estimator": "pgrpo",
            "train": {"rollout/reward_mean": 0.1 * step, "kl": 0.01, "timing/generation": 2.0, **train},
            "pref_groups": {
                name: {
                    "samples": count,
                    "share": count / total,
                    "reward_mean": mean,
                    "reward_std": std,
                    "advantage_mean": 0.0,
                    "advantage_std": 1.0,
                    "history_mean": mean,
                    "history_std": std,
                    **(more or {}),
                }
                for name, (count, mean, std) in rewards.items()
            },
        }
        if samples is not None:
            row["samples"] = samples
        if run is not None:
            row["run"] = run
        return row

    return make_row


@pytest.fixture
def write_run(tmp_path):
    """Writes rows, and then `tail`, to `folder`/metrics.jsonl in the test's own folder. Returns the file."""

    def write_run(folder, rows, tail=""):
        file = tmp_path / folder / "metrics.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        return file

    return write_run
