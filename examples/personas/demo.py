"""Trains SmolLM2-135M-Instruct with P-GRPO for seven personas, and shows how each of them changed.

    python examples/personas/demo.py [FOLDER] [--steps N]        # `make demo` does this

It runs real OpenRLHF, Ray, vLLM and DeepSpeed. Without a GPU, it takes two cores and about six minutes.
FOLDER (default demo-run) gets the trained checkpoint, metrics.jsonl, TensorBoard logs, the full log and the report.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from models import build_policy
from openrlhf_pgrpo.report import write_report
from openrlhf_pgrpo.report.numbers import standard_error, summarise
from openrlhf_pgrpo.report.runs import read

HERE = Path(__file__).resolve().parent
PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, NEW_TOKENS = 16, 2, 24
SHOWN = ("vera", "zoe", "mara")  # personas with answers printed before and after
PROGRESS = "[pgrpo] step "


def train_command(policy: Path, folder: Path, steps: int) -> list[str]:
    """The training run, as a user would type it."""
    flags = {
        "--actor.model_name_or_path": policy,
        "--data.prompt_dataset": HERE / "prompts.jsonl",
        "--data.input_key": "prompt",
        "--data.label_key": "persona",
        "--data.max_samples": steps * PROMPTS_PER_STEP,
        "--reward.remote_url": HERE / "reward.py",
        "--advantage_estimator": "pgrpo",
        "--data.pref_group_key": "persona",
        "--data.user_key": "user",
        "--vllm.num_engines": 1,
        "--actor.num_gpus_per_node": 2,  # two ranks; without a GPU one per core
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
        "--logger.metrics_path": folder / "metrics.jsonl",
        "--logger.tensorboard_dir": folder / "tensorboard",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words, "--data.apply_chat_template"]


def train(policy: Path, folder: Path, steps: int) -> None:
    """Runs the training."""
    log = folder / "train.log"
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    print(f"training {steps} steps of {PROMPTS_PER_STEP} prompts x {SAMPLES_PER_PROMPT} samples; all output: {log}")
    follow(train_command(policy, folder, steps), log)


def follow(command: list[str], log: Path, cwd: Path | None = None) -> list[str]:
    """Runs a training, prints its line for each step and returns these lines; all output goes to the log."""
    with open(log, "w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd)
    steps = []
    with open(log, errors="replace") as output:
        try:
            unfinished = ""
            while True:
                ended = run.poll() is not None  # before the read, so that the last read comes after the end
                *lines, unfinished = (unfinished + output.read()).split("\n")
                for line in lines:
                    if PROGRESS in line:
                        steps.append(line[line.index(PROGRESS) :])
                        print(steps[-1], flush=True)
                if ended:
                    break
                time.sleep(0.5)
        finally:
            run.terminate()
            run.wait()
    if run.returncode != 0:
        raise SystemExit(f"training failed; the reason is at the end of {log}")
    return steps


def summary(metrics: Path) -> str:
    """Mean reward of each persona in the first and the last quarter of the run, with standard errors over samples."""
    run = read(metrics, "demo")
    numbers = summarise(run)
    steps = f"{numbers.quarter} steps"
    lines = ["", f"reward, first {steps} -> last {steps} (± standard error over samples)"]
    for row in sorted(range(len(run.pref_groups)), key=run.pref_groups.__getitem__):
        ends = [
            f"{part.mean[row]:+.2f} ± {standard_error(part)[row]:.2f}" if part.count[row] else "not in these steps"
            for part in (numbers.first, numbers.last)
        ]
        lines.append(f"  {run.pref_groups[row]}  {ends[0]}  ->  {ends[1]}")
    return "\n".join(lines)


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the training run also ends
    os.environ.setdefault("TQDM_DISABLE", "1")  # the line of each step is the progress bar
    args.folder.mkdir(parents=True, exist_ok=True)

    print("building SmolLM2-135M-Instruct from its pip package (once)")
    policy = build_policy()
    train(policy, args.folder, args.steps)
    report = write_report([args.folder], args.folder / "report.html")

    before, after = answers(policy), answers(args.folder / "checkpoint")
    for name in SHOWN:
        question, old = before[name]
        print(f"\n{name}: {question}\n  before: {' '.join(old.split())}\n  after:  {' '.join(after[name][1].split())}")
    print(summary(args.folder / "metrics.jsonl"))
    print(f"\ncheckpoint   {args.folder / 'checkpoint'}\nmetrics      {args.folder / 'metrics.jsonl'}")
    print(f"TensorBoard  {args.folder / 'tensorboard'}\nreport       {report}")


if __name__ == "__main__":
    main()
