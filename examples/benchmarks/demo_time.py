"""A step and the start of the demo, without a GPU, and those of TRL's GRPOTrainer with the same model, prompts,
rewards and samples, if TRL is there.

    python examples/benchmarks/demo_time.py [FOLDER] [--steps 8] [--rounds 2]
    python -m pip install --no-deps --target TRL trl==1.16.0
    PYTHONPATH=TRL python examples/benchmarks/demo_time.py

SmolLM2-135M answers 16 prompts twice in 24 tokens and takes one gradient step, in micro batches of 8. TRL writes with
transformers, in one process that uses all cores, in float32 (its default here) and in bfloat16. The demo runs as users
run it: vLLM writes, two DeepSpeed ranks train in bfloat16. All run in turn; the time is the wall clock's, from the end
of a step to the end of the next, and the first steps of a run, which warm up, do not count. The start of a run is what
comes before its first step: the time until that ends, less a step.

FOLDER (default demo-time-run) gets the runs with their logs.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PERSONAS = HERE.parent / "personas"
sys.path[:0] = [str(HERE), str(PERSONAS)]

from demo import NEW_TOKENS, PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, train_command  # noqa: E402
from models import build_policy  # noqa: E402
from tiny_run import new_folder, run_to_the_end  # noqa: E402

WARM_UP, MICRO_BATCH = 2, 8
CONTENDERS = ("TRL float32", "TRL bfloat16", "demo")
PARTS = ("generation", "make_experience", "ppo_train", "broadcast")  # of a step of the demo, by the host's clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo-time-run"))
    parser.add_argument("--steps", type=int, default=8, help=f"of a run; the first {WARM_UP} do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)  # a run of TRL, in FOLDER
    args = parser.parse_args()
    if args.trl:
        return train_with_trl(args.folder, args.trl, args.steps)
    if args.steps < WARM_UP + 2 or args.rounds < 1:
        parser.error(f"needs --steps of at least {WARM_UP + 2} and --rounds of at least 1")
    folder = new_folder(parser, args.folder)
    contenders = CONTENDERS
    if importlib.util.find_spec("trl") is None:
        contenders = ("demo",)
        print("without TRL, which is not installed: see the first lines of this file")
    policy, seconds, starts = build_policy(), *({name: [] for name in contenders} for _ in range(2))
    parts = []
    for number in range(args.rounds):
        for name in contenders:
            run = folder / f"{number}-{name.replace(' ', '-')}"
            run.mkdir()
            began = time.time()
            if name == "demo":
                run_to_the_end(train_command(policy, run, args.steps), run / "train.log", {})
                rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                ends = [row["time"] for row in rows]
                parts += [[row["train"][f"timing/{part}"] for part in PARTS] for row in rows[WARM_UP:]]
            else:
                words = [run, "--trl", name.split()[1], "--steps", args.steps]
                run_to_the_end([sys.executable, __file__, *map(str, words)], run / "train.log", {})
                ends = json.loads((run / "ends.json").read_text())
            steps = np.diff(ends)[WARM_UP - 1 :].tolist()
            seconds[name] += steps
            starts[name].append(ends[0] - began - np.median(steps))
            print(f"{run.name:16}  median step {np.median(steps):6.2f} s, start {starts[name][-1]:5.1f} s", flush=True)
    medians = {name: np.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        ratio = f"demo / {name}: {medians['demo'] / median:.2f}" if name != "demo" else ""
        print(f"{name:14}{median:8.2f} s   {ratio:26}  start {np.median(starts[name]):5.1f} s")
    print("of it " + ", ".join(f"{part} {value:.1f} s" for part, value in zip(PARTS, np.median(parts, axis=0))))


def train_with_trl(folder: Path, dtype: str, steps: int) -> None:
    """Trains as the demo does, and writes the times at which steps ended into `folder`/ends.json."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward import reward_func

    def reward(completions, persona, **_):
        answers = [completion[0]["content"] for completion in completions]
        return reward_func(answers, [""] * len(answers), persona)["rewards"].tolist()

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.time())

    rows = [json.loads(line) for line in (PERSONAS / "prompts.jsonl").read_text().splitlines()]
    policy = build_policy()
    samples = PROMPTS_PER_STEP * SAMPLES_PER_PROMPT
    settings = GRPOConfig(
        output_dir=str(folder / "trained"),
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=samples // MICRO_BATCH,
        num_generations=SAMPLES_PER_PROMPT,
        max_completion_length=NEW_TOKENS,
        learning_rate=5e-5,
        beta=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=getattr(torch, dtype)),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "persona": row["persona"]} for row in rows]),
        callbacks=[Clock()],
    ).train()
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
