"""What a run leaves for its reader: whole rows, also after a kill and a resume, settings, samples, a line a step."""

import json

import pytest
import torch

from openrlhf_pgrpo.host.run_log import MOST_SAMPLES, JSONLines, Progress, SamplePicker, description
from openrlhf_pgrpo.host.tags import TaggedPrompt

pytestmark = pytest.mark.host


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_on_disk_one_by_one(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = JSONLines(path)
    for step in (1, 2):
        file.append({"step": step})
        assert steps(path) == list(range(1, step + 1))
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_the_first_row_of_a_process_says_what_runs(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first in (1, 3):
        file = JSONLines(path, {"started": first})
        for step in (first, first + 1):
            file.append({"step": step})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("run") for row in rows] == [{"started": 1}, None, {"started": 3}, None]


def test_a_resumed_run_writes_its_steps_again_and_drops_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tra')  # killed in step 4, checkpoint at 2
    file = JSONLines(path)
    file.append({"step": 3, "again": True})
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["again"]


def test_a_fresh_run_replaces_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    JSONLines(path).append({"step": 1})
    assert steps(path) == [1]


def test_b3_the_metrics_of_another_run_are_kept(tmp_path):
    """A run whose --ckpt.path was mistyped starts anew, twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    for _ in range(2):
        JSONLines(path).append({"step": 1})
    assert steps(path) == [1]
    assert steps(tmp_path / "metrics.old-1.jsonl") == [1, 2] and steps(tmp_path / "metrics.old-2.jsonl") == [1]


@pytest.mark.parametrize(
    "second", [b'{"loss": 1}', b"[1]", b"null", b'{"step": "2"}', b'{"step": true}', b"\x00\xff", b"{", b"[" * 99999]
)
def test_d8_a_file_of_something_else_is_refused_before_the_first_step(tmp_path, second):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + second + b"\n")
    with pytest.raises(ValueError, match=r"whole number \"step\", got .* in line 2 of .*: move that file away"):
        JSONLines(path)
    assert path.read_bytes().endswith(second + b"\n")


def test_d8_blank_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('\n{"step": 1}\n \n')
    JSONLines(path).append({"step": 2})
    assert steps(path) == [1, 2]


def test_d8_a_folder_cannot_hold_the_rows(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "metrics.jsonl"):
        with pytest.raises(ValueError, match="metrics need a file, got .*: pass --logger.metrics_path"):
            JSONLines(path)


def test_the_settings_are_those_of_the_command_line_without_secrets(host_args):
    url = "http://ana:geheim@judge:5000/score"
    args = host_args("--logger.wandb.key", "geheim", "--reward.remote_url", url, "--actor.adam.lr", "1e-5")
    args.ckpt.save_steps = float("inf")  # what the host makes of -1
    run = description(args)
    settings = json.loads(json.dumps(run["settings"], allow_nan=False))
    assert settings["actor.adam.lr"] == 1e-5 and settings["ckpt.save_steps"] == "inf"
    assert settings["actor.adam.betas"] == [0.9, 0.95] and settings["pgrpo.half_life"] is None
    assert settings["reward.remote_url"] == "http://(hidden)@judge:5000/score"
    assert "geheim" not in json.dumps(run)
    assert {"python", "torch", "openrlhf", "ray", "openrlhf-pgrpo"} <= set(run["versions"])


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, tokens))


class Spoken:
    """Experiences of one sample each, as far as a picker looks: (preference group, prompt, answer, reward)."""

    def __init__(self, pref_group, prompt, answer, reward):
        self.prompts, self.rewards = [TaggedPrompt(prompt, pref_group)], torch.tensor([[reward]])
        self.sequences = torch.tensor([[ord(letter) for letter in prompt + answer] + [0, 0]])
        mask = [False] * (len(prompt) - 1) + [True] * len(answer) + [False, False]
        self.action_mask = torch.tensor([mask])


def test_one_answer_of_each_preference_group_is_kept():
    picker = SamplePicker(Letters())
    batch = [Spoken("a", "one?", "yes", 1.0), Spoken("a", "two?", "no", 2.0), Spoken("b", "six?", "ah", 3.0)]
    assert picker.pick(batch) == [
        {"pref_group": "a", "prompt": "one?", "response": "yes", "reward": 1.0},
        {"pref_group": "b", "prompt": "six?", "response": "ah", "reward": 3.0},
    ]
    # Later the prompt that was asked before is chosen again, at any position.
    batch = [Spoken("a", "ten?", "x", 0.0), Spoken("a", "one?", "YES", 4.0), Spoken("a", "one?", "z", 5.0)]
    (again,) = picker.pick(batch)
    assert (again["prompt"], again["response"]) == ("one?", "YES")


def test_long_texts_and_many_preference_groups_are_cut():
    (sample,) = SamplePicker(Letters()).pick([Spoken("a", "p" * 3000, "x" * 2001, 1.0)])
    assert sample["prompt"] == "p" * 2000 + " …" and sample["response"] == "x" * 2000 + " …"
    many = [Spoken(f"group {i}", "why?", "so", 1.0) for i in range(40)]
    assert len(SamplePicker(Letters()).pick(many)) == MOST_SAMPLES


def groups(**means):
    return {name: {"reward_mean": mean} for name, mean in means.items()}


def test_the_line_shows_step_part_time_left_and_rewards():
    progress = Progress(total_prompts=100, prompts_per_step=10)
    line = progress.line(1, 10, 30.0, groups(b=2.0, a=-1.25), now=1000.0)
    assert line == "[pgrpo] step 1  10%  ETA 4:30  reward: a -1.25  b +2.00"  # 90 prompts left, 3 s each
    # 20 more prompts took 15 s: with the first ten, 45 s for 30 prompts, 70 are left
    assert "step 3  30%  ETA 1:45 " in progress.line(3, 30, 5.0, groups(a=0.0), now=1015.0)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_only():
    progress = Progress(total_prompts=1000, prompts_per_step=10)
    assert "step 81  81%  ETA 1:35:00 " in progress.line(81, 810, 300.0, groups(a=0.0), now=5.0)


def test_the_line_of_many_preference_groups_shows_the_lowest():
    line = Progress(100, 10).line(1, 10, 1.0, groups(**{f"g{i}": float(i) for i in range(50)}), now=0.0)
    lowest = "  ".join(f"g{i} +{i}.00" for i in range(8))
    assert line.endswith(f"reward: {lowest}  (the lowest 8 of 50 preference groups)")
    assert Progress(100, 10).line(1, 10, 1.0, {}, now=0.0).endswith("reward: no preference groups")
