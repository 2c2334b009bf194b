"""GR-DPO and factorized reward models through the host's trainers on one device: ZeRO-2, bf16, no flash attention."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu

DOORS = {
    "train_dpo": ("--data.pref_group_key", "who", "--robust.eta", 1),
    "train_rm": ("--reward.factors", 2, "--data.user_key", "user"),
}
SAVED, STEPS = 8, 16
# How far runs in bf16 may be apart: parts of the range of the losses, and of the way that the weights went. On a CPU,
# bf16 is 0.004 and 0.08 away from float32, and eager attention 0.005 and 0.05 from SDPA.
LOSSES, WEIGHTS = 0.02, 0.2


@pytest.fixture(scope="module")
def start(tiny) -> dict[str, torch.Tensor]:
    """The weights from which both trainers start."""
    return {name: value.float() for name, value in load_file(tiny / "model" / "model.safetensors").items()}


@pytest.fixture(scope="module")
def commands(tiny, pairs) -> dict[str, tuple]:
    """Sixteen steps, evaluated and saved at every eighth, on attention that adds in one order."""
    flags = {
        "--model.model_name_or_path": tiny / "model",
        "--data.dataset": pairs,
        "--data.prompt_key": "prompt",
        "--data.max_len": 64,
        "--eval.dataset": pairs,
        "--eval.split": "train",
        "--eval.steps": SAVED,
        "--train.batch_size": 8,
        "--train.micro_batch_size": 4,
        "--train.max_epochs": 2,
        "--adam.lr": 3e-4,
        "--ckpt.save_steps": SAVED,
        "--ds.zero_stage": 2,
        "--ds.attn_implementation": "eager",
    }
    words = [word for flag in flags.items() for word in flag]
    return {door: (door, *words, *ours) for door, ours in DOORS.items()}


@pytest.fixture(scope="module")
def runs(commands, train, pool) -> dict:
    """The runs of both trainers on this device and on the CPU, all under way."""
    exact = {"DETERMINISTIC": "1"}
    return {
        (door, where): pool.submit(train, f"{door}-{where}", *words, **exact, **on)
        for door, words in commands.items()
        for where, on in {"here": {}, "on-cpu": {"on": "cpu"}}.items()
    }


def test_deepspeed_compiles_its_adam(adam, device):
    if device == "cpu":
        pytest.skip("needs a GPU: on a CPU the host's optimizer is PyTorch's")
    assert adam is None, adam


def losses(steps: list[dict]) -> np.ndarray:
    """Training losses of all steps, then those of evaluations."""
    found = [row["train"]["loss_mean"] for row in steps]
    for row in steps:
        found += [value for name, value in row.get("evaluation", {}).items() if name.endswith("loss")]
    return np.array(found)


@pytest.mark.parametrize("door", DOORS)
def test_losses_and_weights_are_those_of_the_cpu_within_bf16(door, runs, start):
    here, on_cpu = runs[door, "here"].result(), runs[door, "on-cpu"].result()
    assert len(here.steps) == len(on_cpu.steps) == STEPS
    found, expected = losses(here.steps), losses(on_cpu.steps)
    assert np.abs(found - expected).max() < LOSSES * np.ptp(expected)

    learned, expected = here.weights(), on_cpu.weights()
    assert learned.keys() == expected.keys()
    moved, apart = (
        math.hypot(*(float((one[name] - other[name]).norm()) for name in start.keys() & expected.keys()))
        for one, other in ((expected, start), (learned, expected))
    )
    assert moved > 0 and apart < WEIGHTS * moved


@pytest.mark.parametrize("door", DOORS)
def test_a_resumed_run_is_the_whole_one_to_the_bit(door, commands, runs, train):
    """From the first checkpoint, as if the run had died behind it."""
    whole = runs[door, "here"].result()
    again = whole.folder.with_name(f"{door}-again")
    tag = f"global_step{SAVED}"
    shutil.copytree(whole.folder / "ckpt" / tag, again / "ckpt" / tag)
    (again / "ckpt" / "latest").write_text(tag)
    resumed = train(again.name, *commands[door], "--ckpt.load_enable", DETERMINISTIC="1")
    assert [row["step"] for row in resumed.steps] == [*range(SAVED + 1, STEPS + 1)]
    for row, expected in zip(resumed.steps, whole.steps[SAVED:], strict=True):
        assert numbers(row) == numbers(expected)
    learned = resumed.weights()
    assert all(torch.equal(value, learned[name]) for name, value in whole.weights().items())


def numbers(row: dict) -> dict:
    """A row of the metrics without times and the description of its run."""
    return {name: value for name, value in row.items() if name not in ("time", "run")}
