"""Train SmolLM2-135M-Instruct with P-GRPO for seven personas, and show what became of each of them.

    python examples/personas/demo.py [FOLDER] [--steps N]        # `make demo` does this

Real OpenRLHF, Ray, vLLM and DeepSpeed; on a machine without a GPU, two cores and about ten minutes are enough.
FOLDER (default demo-run) gets the trained checkpoint, metrics.jsonl, TensorBoard logs, the full log and the plot.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from models import build_policy
from plot import plot, read

HERE = Path(__file__).resolve().parent
PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, NEW_TOKENS = 16, 2, 24
SHOWN = ("vera", "zoe", "mara")  # whose answers are printed before and after


def train_command(policy: Path, folder: Path, steps: int) -> list[str]:
    """The training run, as one would type it."""
    flags = {
        "--actor.model_name_or_path": policy,
        "--data.prompt_dataset": HERE / "prompts.jsonl",
        "--data.input_key": "prompt",
        "--data.label_key": "persona",
        "--data.max_samples": steps * PROMPTS_PER_STEP,
        "--reward.remote_url": HERE / "reward.py",
        "--advantage_estimator": "pgrpo",
        "--pgrpo.group_key": "persona",
        "--pgrpo.user_key": "user",
        "--vllm.num_engines": 1,
        "--actor.num_gpus_per_node": 2,  # two ranks; without a GPU that means one per core
        "--rollout.batch_size": PROMPTS_PER_STEP,
        "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
        "--rollout.micro_batch_size": 8,
        "--rollout.max_new_tokens": NEW_TOKENS,
        "--train.batch_size": PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
        "--train.micro_batch_size": 8,
        "--data.max_len": 96,
        "--actor.adam.lr": 5e-5,
        "--algo.kl.init_coef": 0,
        "--ckpt.output_dir": folder / "checkpoint",
        "--ckpt.path": folder / "deepspeed",
        "--pgrpo.metrics_path": folder / "metrics.jsonl",
        "--logger.tensorboard_dir": folder / "tensorboard",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words, "--data.apply_chat_template"]


def train(policy: Path, folder: Path, steps: int) -> None:
    """Runs the training and prints a line as each step is logged; everything else goes to train.log."""
    metrics, log = folder / "metrics.jsonl", folder / "train.log"
    metrics.unlink(missing_ok=True)
    print(f"training {steps} steps of {PROMPTS_PER_STEP} prompts x {SAMPLES_PER_PROMPT} samples; all output: {log}")
    started, seen = time.monotonic(), 0
    with open(log, "w") as output:
        run = subprocess.Popen(train_command(policy, folder, steps), stdout=output, stderr=subprocess.STDOUT)
        try:
            while run.poll() is None:
                time.sleep(0.5)
                rows = read(metrics)
                for row in rows[seen:]:
                    print(progress(row, steps, time.monotonic() - started), flush=True)
                seen = len(rows)
        finally:
            run.terminate()
            run.wait()
    if run.returncode != 0:
        raise SystemExit(f"training failed; the reason is at the end of {log}")


def progress(row: dict, steps: int, seconds: float) -> str:
    groups = "  ".join(f"{name} {group['reward_mean']:+.2f}" for name, group in sorted(row["pref_groups"].items()))
    return f"step {row['step']:3d}/{steps}  {seconds:4.0f} s  reward: {groups}"


def summary(rows: list[dict]) -> str:
    """Mean reward of each persona in the first and the last quarter of the run, with standard errors over samples."""
    quarter = max(1, len(rows) // 4)
    lines = ["", f"reward, first {quarter} steps -> last {quarter} steps (± standard error over samples)"]
    for name in sorted({name for row in rows for name in row["pref_groups"]}):
        lines.append(f"  {name}  {mean_reward(rows[:quarter], name)}  ->  {mean_reward(rows[-quarter:], name)}")
    return "\n".join(lines)


def mean_reward(rows: list[dict], name: str) -> str:
    groups = [row["pref_groups"][name] for row in rows if name in row["pref_groups"]]
    count = sum(group["samples"] for group in groups)
    if count == 0:
        return "not in these steps"
    mean = sum(group["samples"] * group["reward_mean"] for group in groups) / count
    deviations = [(group["samples"], group["reward_std"], group["reward_mean"] - mean) for group in groups]
    squares = sum(samples * (std**2 + shift**2) for samples, std, shift in deviations)
    return f"{mean:+.2f} ± {math.sqrt(squares) / count:.2f}"


def answers(model_folder: Path) -> dict[str, tuple[str, str]]:
    """The most likely answer of a model to one question of each persona in SHOWN: name -> (question, answer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = [json.loads(line) for line in (HERE / "prompts.jsonl").read_text().splitlines()]
    chats = [next(row["prompt"] for row in reversed(rows) if row["persona"] == name) for name in SHOWN]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    spoken = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {name: (chat[-1]["content"], text) for name, chat, text in zip(SHOWN, chats, spoken)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo-run"))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the training run is ended with us
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own line a step is the progress bar
    args.folder.mkdir(parents=True, exist_ok=True)

    print("building SmolLM2-135M-Instruct from its pip package (once)")
    policy = build_policy()
    train(policy, args.folder, args.steps)
    figure = plot(args.folder / "metrics.jsonl", args.folder / "rewards.png")

    before, after = answers(policy), answers(args.folder / "checkpoint")
    for name in SHOWN:
        question, old = before[name]
        print(f"\n{name}: {question}\n  before: {' '.join(old.split())}\n  after:  {' '.join(after[name][1].split())}")
    print(summary(read(args.folder / "metrics.jsonl")))
    print(f"\ncheckpoint   {args.folder / 'checkpoint'}\nmetrics      {args.folder / 'metrics.jsonl'}")
    print(f"TensorBoard  {args.folder / 'tensorboard'}\nplot         {figure}")


if __name__ == "__main__":
    main()
