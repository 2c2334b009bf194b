"""The host's preference trainer with group-robust weights: real DeepSpeed, on gloo, as a user starts it."""

import json
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.e2e

OURS = "openrlhf_pgrpo.cli.train_dpo"
FLOAT32 = Path(__file__).parent / "float32.py"
ROBUST = ("--data.pref_group_key", "who", "--robust.eta", "1")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """50 pairs to train on, 11 to evaluate on: three in four prefer yes, one no, and no prompt says who asks."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count in {"train": 50, "eval": 11}.items():
        rows = []
        for i in range(count):
            yes, no = "yes" * (1 + i % 3), "no" * (1 + i % 2)
            pair = {"chosen": no, "rejected": yes} if i % 4 == 3 else {"chosen": yes, "rejected": no}
            rows.append({"prompt": f"{i} asks: ", "who": "few" if i % 4 == 3 else "many", **pair})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(tiny, pairs, start_in_turn):
    """Starts runs in turn, each given as its name and its flags."""

    def train(*runs, script=OURS, **how):
        argv = {
            "--model.model_name_or_path": tiny / "model",
            "--data.dataset": pairs / "train.jsonl",
            "--data.prompt_key": "prompt",
            "--data.max_len": 64,
            "--eval.dataset": pairs / "eval.jsonl",
            "--eval.split": "train",
            "--eval.steps": 3,
            "--train.batch_size": 8,
            "--train.max_epochs": 2,
            "--adam.lr": 1e-3,
        }
        return start_in_turn(script, argv, [(name, flags) for name, *flags in runs], **how)

    return train


def learned(run) -> dict[str, torch.Tensor]:
    """What a run has learned."""
    (file,) = run.files
    # The head is the embedding, which ZeRO-3 saves a second time.
    return {name: value for name, value in load_file(file).items() if name != "lm_head.weight"}


def numbers(steps: list[dict]) -> torch.Tensor:
    """All that the metrics say of preference groups, in one vector."""
    found = []
    for row in steps:
        evaluation = {key: value for key, value in row.get("evaluation", {}).items() if key != "worst_group"}
        for group in (*(row["pref_groups"][name] for name in sorted(row["pref_groups"])), evaluation):
            found += [group[key] for key in sorted(group)]
    return torch.tensor(found, dtype=torch.float64)


def close(one, other) -> bool:
    """Losses, accuracies and weights of every step, and the policy that was learned, to 1e-5."""
    same = torch.allclose(numbers(one.steps), numbers(other.steps), rtol=0, atol=1e-5)
    policy = learned(other)
    return same and all(torch.allclose(value, policy[name], rtol=0, atol=1e-5) for name, value in learned(one).items())


def test_neither_micro_batches_nor_ranks_matter(train):
    def run(name, micro_batch, *flags):
        return name, *ROBUST, "--train.micro_batch_size", micro_batch, *flags

    exact, micro_batches, previous = train(
        run("exact", 8),
        run("four-micro-batches", 2),
        run("previous", 8, "--robust.weights", "previous"),
        script=FLOAT32,
    )
    exact.finish()
    previous_two_ranks, zero_3 = train(
        run("previous-two-ranks", 2, "--robust.weights", "previous"),
        run("two-ranks-zero-3", 1, "--ds.zero_stage", 3),
        **dict(script=FLOAT32, ranks=2),
    )
    zero_3.finish()
    assert [row["step"] for row in exact.steps] == [*range(1, 13)]
    assert close(exact, micro_batches)
    assert close(exact, zero_3)
    assert close(previous, previous_two_ranks)
    assert not close(exact, previous)

    # The weight of a loss is N alpha_g / N_g, with the alpha of this step (exact) or of the step before (previous).
    left = 0.5
    for of_exact, of_previous in zip(exact.steps, previous.steps):
        for group in of_exact["pref_groups"].values():
            assert group["weight"] == pytest.approx(group["alpha"] / group["share"])
        many = of_previous["pref_groups"]["many"]
        assert many["weight"] == pytest.approx(left / many["share"])
        left = many["alpha"]


def test_kill_and_resume_is_exact_with_lora_and_ipo(train):
    flags = (
        *("--data.pref_group_key", "who", "--model.ipo_enable", "--robust.eta", 0.01, "--train.micro_batch_size", 2),
        *("--ds.lora.rank", 4, "--adam.lr", 1e-2, "--ckpt.save_steps", 5, "--train.max_epochs", 4),
        *("--robust.patience", 2, "--robust.plateau", "reduce_lr", "--robust.save_best"),
    )
    whole, cut = train(("whole", *flags), ("cut", *flags))
    latest, deadline = cut.folder / "ckpt" / "latest", time.monotonic() + 600
    while not (latest.exists() and latest.read_text() == "global_step5"):
        assert cut.process.poll() is None and time.monotonic() < deadline, cut.log.read_text()[-4000:]
        time.sleep(0.01)
    cut.kill()
    assert "learning rate x 0.1, eta x 0.5" in whole.log.read_text()
    assert len(cut.steps) < len(whole.steps) == 24
    load = (*flags, "--ckpt.load_enable")
    slower = (*load, "--adam.lr", 1e-4, "--train.max_epochs", 5)  # in a folder of its own, which it goes on with
    shutil.copytree(cut.folder, cut.folder.with_name("slower"))
    resumed, lowered, refused = train(("cut", *load), ("slower", *slower), ("cut", *load, "--robust.eta", 0.02))
    assert refused.process.wait(600) != 0
    assert "--robust.eta 0.01 in the checkpoint, 0.02 now" in refused.log.read_text()
    assert "the learning rate is 0.0001 from here on; the checkpoint was made with 0.01" in lowered.log.read_text()
    assert all(0 < row["train"]["lr"] <= 1e-4 for row in lowered.steps[5:]) and lowered.steps[-1]["step"] == 30
    assert [row["step"] for row in resumed.steps] == [*range(1, 25)]
    assert torch.equal(numbers(resumed.steps), numbers(whole.steps))
    assert [row["train"]["lr"] for row in resumed.steps] == [row["train"]["lr"] for row in whole.steps]
    policy = learned(whole)
    assert all(torch.equal(value, policy[name]) for name, value in learned(resumed).items())

    losses = {row["step"]: row["evaluation"]["worst_group_loss"] for row in whole.steps if "evaluation" in row}
    (best,) = (whole.folder / "ckpt").glob("best_global_step*")
    assert best.name == f"best_global_step{min(losses, key=losses.get)}"


def test_a_loss_that_is_not_finite_ends_all_ranks(train):
    """IS-IPO by the launcher of DeepSpeed, at a learning rate that a float32 cannot hold."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launcher = (deepspeed, "--num_accelerators", "2", "--master_port", port, "--module")
    flags = ("--model.ipo_enable", "--robust.chi", 0, "--adam.lr", 1e39, "--train.micro_batch_size", 2)
    (run,) = train(("broken", "--data.pref_group_key", "who", *flags), launcher=launcher)
    assert run.process.wait(600) != 0
    log = run.log.read_text(errors="replace")
    for rank in (0, 1):
        assert f"[rank{rank}]: ValueError: weights need a finite loss, got nan of preference group" in log
    assert [row["estimator"] for row in run.steps] == ["IS-IPO"] * 2
    assert not run.files


def test_a_patched_host_trains_as_usual_and_robust_weights_help_the_worst(train, host_copy):
    """Fixed weights equal to the data's shares weigh every pair by 1, so training equals the host's to the bit."""
    assert host_copy.command("patch").returncode == 0
    flags = ("--data.max_samples", 48, "--train.micro_batch_size", 2, "--train.max_epochs", 4)
    share = ("--data.pref_group_key", "who", "--robust.chi", "0", "--robust.mu", "share")
    plain, same, robust = train(
        ("plain", *flags),
        ("same", *flags, *share),
        ("robust", *flags, *ROBUST),
        **dict(script="openrlhf.cli.train_dpo", **host_copy.environment),
    )
    plain.finish()
    assert not (plain.folder / "out" / "metrics.jsonl").exists()
    policy = learned(plain)
    assert all(torch.equal(value, policy[name]) for name, value in learned(same).items())
    before, after = same.steps[-1]["evaluation"], robust.steps[-1]["evaluation"]
    assert before["worst_group"] == "few"
    assert after["worst_group_loss"] < before["worst_group_loss"] and after["loss_gap"] < before["loss_gap"]
