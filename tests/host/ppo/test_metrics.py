"""Preference-group metrics reach every logger of the host, through its own trainer class."""

import json
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.host


def test_jsonl_tensorboard_and_wandb_get_the_same_numbers(
    host_args, make_experiences, stand_ins, tmp_path, monkeypatch, capsys
):
    from openrlhf.trainer.ppo_trainer import BasePPOTrainer
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    args = host_args(
        "--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona", "--pgrpo.min_count", "4",
        "--rollout.n_samples_per_prompt", "4", "--ckpt.save_steps", "100",
        "--rollout.batch_size", "96",
        "--logger.tensorboard_dir", str(tmp_path / "tb"), "--logger.wandb.key", "0" * 40,
    )  # fmt: skip
    monkeypatch.setattr("ray.get", lambda refs: refs)
    strategy = SimpleNamespace(args=args)
    actors, tokenizer = stand_ins.ActorGroup(max_steps=12), stand_ins.Tokenizer()
    trainer = BasePPOTrainer(strategy, actors, None, None, None, None, tokenizer)
    experiences = make_experiences(np.random.default_rng(0).normal(size=(6, 4)), pref_groups=("a", "b/c"))
    trainer.experience_maker.compute_advantages_and_returns(experiences)
    status = {"reward": 2.5, "timing/step_total": 3.0, "generated_samples": ["text", 1.0]}
    trainer.experience_maker.partial_logs = {"math": 0.5}  # d6: a log that only some samples have
    for step in (1, 2):
        trainer.save_logs_and_checkpoints(step, status, {"total_consumed_prompts": 96 * step})
    trainer.tensorboard_logger.close()

    row, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["step"] == 1 and row["estimator"] == "pgrpo"
    assert row["train"] == {"reward": 2.5, "timing/step_total": 3.0, "math": 0.5}
    assert set(row["pref_groups"]) == {"a", "b/c"}
    assert set(row["pref_groups"]["a"]) == {
        *("samples", "share", "reward_mean", "reward_std", "advantage_mean", "advantage_std"),
        *("history_count", "history_mean", "history_std", "response_length_mean"),
    }
    assert {sample["pref_group"] for sample in row["samples"]} == {"a", "b/c"}
    run = row["run"]
    assert run["versions"]["openrlhf"] == metadata.version("openrlhf") and run["device"] == "cpu"
    assert run["settings"]["algo.advantage.estimator"] == "pgrpo" and run["settings"]["logger.wandb.key"] == "(hidden)"
    assert run["total_prompts"] == 12 * 128 // 4  # optimizer steps x samples of each / samples per prompt
    assert "run" not in second  # once for each process
    assert "[pgrpo] step 1  25%  ETA 0:09  reward: a " in capsys.readouterr().out  # three more steps like this one
    (events,) = (tmp_path / "tb").rglob("events*")
    board, summary = EventAccumulator(str(events.parent)).Reload(), trainer.wandb_logger.handle.run.summary
    for name, group in row["pref_groups"].items():
        for key, value in group.items():
            tag = f"train/pref_group/{name}/{key}"
            assert board.Scalars(tag)[0].value == pytest.approx(value, rel=1e-6, abs=1e-7)
            assert summary[tag] == pytest.approx(value)
    assert summary["train/reward"] == 2.5
    trainer.wandb_logger.close()


def test_only_the_largest_of_many_preference_groups_are_logged(make_experiences, monkeypatch):
    from openrlhf_pgrpo.host.ppo import metrics

    experiences = make_experiences(np.zeros((7, 2)), pref_groups=("d", "a", "c", "b", "c"))
    for experience in experiences:
        experience.advantages = experience.values
    names = ["d", "a", "c", "b"]
    rows = np.array([names.index(prompt.pref_group) for e in experiences for prompt in e.prompts])
    everyone = metrics.by_pref_group(experiences, names, rows)
    assert {name: group["samples"] for name, group in everyone.items()} == {"a": 4, "b": 2, "c": 4, "d": 4}
    monkeypatch.setattr(metrics, "MOST_PREF_GROUPS", 2)
    largest = metrics.by_pref_group(experiences, names, rows)
    assert largest == {name: everyone[name] for name in ("a", "c")}  # of those with four samples, the first by name
