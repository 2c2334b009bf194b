"""P-GRPO through Ray and vLLM on one device, where they are installed: they are too large for the kit."""

import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from openrlhf_pgrpo.core.estimator import make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions

pytestmark = pytest.mark.gpu

STEPS, PROMPTS = 10, 4
# One GPU for policy and engine, in turns.
ON_ONE_GPU = (
    *("--train.colocate_all", "--vllm.enable_sleep", "--ds.enable_sleep", "--actor.num_gpus_per_node", "1"),
    *("--vllm.gpu_memory_utilization", "0.3", "--ds.attn_implementation", "sdpa"),
)


@pytest.fixture
def whole_stack(device):
    # The host imports flash-attn, also where it is not used. On a CPU its names stand in.
    needed = ("ray", "vllm", "flash_attn") if device == "cuda" else ("ray", "vllm")
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"P-GRPO needs {', '.join(needed)}, got no {', '.join(missing)}: make install-gpu")


def test_advantages_of_ten_steps_are_those_of_a_replay_on_the_cpu(whole_stack, tiny, device, started, tmp_path):
    rows = [json.loads(line) for line in (tiny / "prompts.jsonl").read_text().splitlines()]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(rows[i % len(rows)]) + "\n" for i in range(STEPS * PROMPTS)))
    flags = {
        "--pgrpo.plugin": Path(__file__).with_name("replay.py"),
        "--pgrpo.device": "gpu" if device == "cuda" else "cpu",
        "--pgrpo.min_count": 4,
        "--advantage_estimator": "written_pgrpo",
        "--data.pref_group_key": "persona",
        "--actor.model_name_or_path": tiny / "model",
        "--reward.remote_url": tiny / "reward.py",
        "--data.prompt_dataset": data,
        "--data.input_key": "input",
        "--data.label_key": "answer",
        "--data.max_len": 64,
        "--vllm.num_engines": 1,
        "--rollout.batch_size": PROMPTS,
        "--rollout.n_samples_per_prompt": 2,
        "--rollout.micro_batch_size": 4,
        "--rollout.max_new_tokens": 16,
        "--train.batch_size": 8,
        "--train.micro_batch_size": 4,
        "--actor.adam.lr": 1e-3,
        "--algo.kl.init_coef": 0,
        "--algo.advantage.is_correction_level": "token",
        "--ckpt.path": tmp_path / "ckpt",
        "--ckpt.output_dir": tmp_path / "out",
    }
    words = [str(word) for flag in flags.items() for word in flag] + [*(ON_ONE_GPU if device == "cuda" else ())]
    record = tmp_path / "record.pkl"
    run = started(
        [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words],
        *(tmp_path / "log.txt", {**os.environ, "RECORD": str(record)}),
    )
    try:
        assert run.process.wait(420) == 0, run.tail()
    finally:
        run.kill()

    estimator, written = make_advantage_estimator("pgrpo", PGRPOOptions(min_count=4)), []
    with open(record, "rb") as file:
        while file.peek(1):
            written.append(pickle.load(file))
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(written) == len(steps) == STEPS
    for (batch, advantages), step in zip(written, steps):
        replayed = np.asarray(estimator(batch))
        assert np.array_equal(replayed, advantages)
        # What the trainer got, in float32.
        for name, group in step["pref_groups"].items():
            of_group = replayed.astype(np.float32)[np.array([owner == name for owner in batch.pref_groups])]
            assert group["advantage_mean"] == pytest.approx(of_group.mean(), abs=1e-6)
        assert abs(step["train"]["vllm_kl"]) < 0.01  # the engine has the weights that were trained
