"""The factorized reward model in the host's trainer and in PPO: real DeepSpeed and Ray, as a user starts them."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.e2e

FACTORS = ("--reward.factors", 2, "--data.user_key", "user")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six users: every second one prefers yes to no, the others prefer no."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in {"train": 120, "eval": 36}.items():
        rows = []
        for i in range(count):
            sides = "yes" * (1 + i % 3), "no" * (1 + i % 2)
            chosen, rejected = sides if i % 2 == 0 else sides[::-1]
            rows.append({"prompt": f"{i} asks: ", "user": f"u{i % 6}", "chosen": chosen, "rejected": rejected})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(tiny, pairs, start_in_turn):
    """Starts runs in turn, each given as its name and its flags."""

    def train(*runs, **how):
        argv = {
            "--model.model_name_or_path": tiny / "model",
            "--data.dataset": pairs / "train.jsonl",
            "--data.prompt_key": "prompt",
            "--data.max_len": 64,
            "--eval.dataset": pairs / "eval.jsonl",
            "--eval.steps": 5,
            "--train.batch_size": 8,
            "--train.micro_batch_size": 4,
            "--train.max_epochs": 2,
            "--adam.lr": 1e-3,
        }
        return start_in_turn("openrlhf_pgrpo.cli.train_rm", argv, [(name, flags) for name, *flags in runs], **how)

    return train


def evaluations(run) -> list[dict]:
    return [row["evaluation"] for row in run.steps if "evaluation" in row]


def user_losses(folder: Path, pairs: Path) -> dict[str, float]:
    """Mean loss of each user's pairs to evaluate on, by the saved model, in float32 and without the host."""
    model, rows = load(folder), [json.loads(line) for line in (pairs / "eval.jsonl").read_text().splitlines()]
    prompts, users = [row["prompt"] for row in rows], np.array([model.users.index(row["user"]) for row in rows])
    chosen, rejected = (model.base_rewards(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    losses = np.log1p(np.exp(-((chosen - rejected) * model.coefficients[users]).sum(1)))
    return {name: losses[users == row].mean() for row, name in enumerate(model.users)}


def test_kill_and_resume_is_exact_with_adapters(train, pairs, tmp_path):
    flags = (*FACTORS, "--ds.lora.rank", 4, "--adam.lr", 1e-2, "--ckpt.save_steps", 6, "--data.dataset")
    data = pairs / "train.jsonl"
    whole, cut = train(("whole", *flags, data), ("cut", *flags, data))
    latest, deadline = cut.folder / "ckpt" / "latest", time.monotonic() + 600
    while not (latest.exists() and latest.read_text() == "global_step6"):
        assert cut.process.poll() is None and time.monotonic() < deadline, cut.log.read_text()[-4000:]
        time.sleep(0.01)
    cut.kill()
    assert [row["step"] for row in whole.steps] == [*range(1, 31)]
    assert evaluations(whole)[-1]["worst_user_accuracy"] == 1.0 and evaluations(whole)[-1]["users"] == 6
    folder = whole.folder / "out"
    assert not (folder / "adapter_config.json").exists()  # merged: the folder is the whole model
    expected = evaluations(whole)[-1]
    losses = user_losses(folder, pairs)  # the training ran in bf16
    assert np.mean([*losses.values()]) == pytest.approx(expected["mean_user_loss"], abs=5e-3)
    assert max(losses, key=losses.get) == expected["worst_user"]

    assert len(cut.steps) < 30

    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace('"u5"', '"eve"'))
    resumed, refused = train(
        ("cut", *flags, data, "--ckpt.load_enable"),
        ("cut", *flags, other, "--eval.dataset", other, "--ckpt.load_enable", "--reward.l2", 0.1),
    )
    assert refused.process.wait(600) != 0
    log = refused.log.read_text()
    assert "--reward.l2 0.02 in the checkpoint, 0.1 now" in log
    assert "6 users in the checkpoint, 6 now, 'u5' only there" in log
    assert [row["step"] for row in resumed.steps] == [*range(1, 31)]
    assert evaluations(resumed) == evaluations(whole)
    assert [row["train"] for row in resumed.steps] == [row["train"] for row in whole.steps]
    saved = load_file(folder / "model.safetensors")
    again = load_file(resumed.folder / "out" / "model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in saved.items())


def test_trained_on_two_ranks_with_zero_3_and_used_in_ppo_so_too(train, pairs, start):
    (trained,) = train(("rm", *FACTORS, "--ds.zero_stage", 3, "--train.micro_batch_size", 2), ranks=2)
    folder, expected = trained.folder / "out", evaluations(trained.finish())[-1]
    assert expected["worst_user_accuracy"] == 1.0
    assert np.mean([*user_losses(folder, pairs).values()]) == pytest.approx(expected["mean_user_loss"], abs=5e-3)

    model = load(folder)
    base = model.base_rewards(["who asks: "] * 2, ["yesyes", "nono"])
    yes_over_no = (base[0] - base[1]) @ model.coefficients.T
    assert (yes_over_no[[0, 2, 4]] > 0).all() and (yes_over_no[[1, 3, 5]] < 0).all()

    keys = ("--data.pref_group_key", "persona", "--data.user_key", "who")
    run = start(
        "--advantage_estimator", "pgrpo", *keys, "--reward.model_name_or_path", folder, "--ds.zero_stage", 3,
        "--actor.num_gpus_per_node", 2, "--train.micro_batch_size", 2, "--ckpt.save_steps", 3,
    ).succeed()  # fmt: skip
    assert len(run.steps) == 6
    assert max(abs(row["train"]["vllm_kl"]) for row in run.steps) < 0.01
    assert run.checkpoint("global_step6")["estimator"]["history"]["seen"].sum() == 6 * 8
    assert "each sample's user, one of 6, weighs the base rewards of" in run.output()
    groups = [group for step in run.steps for group in step["pref_groups"].values()]
    assert {name for step in run.steps for name in step["pref_groups"]} == {"ann", "bob", "cleo/3"}
    assert all(0 < abs(group["reward_mean"]) < 10 for group in groups)
