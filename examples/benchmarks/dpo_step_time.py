"""Training steps of GR-DPO and of plain DPO: the host's DPO trainer, same data, same seeds, same sizes.

    python examples/benchmarks/dpo_step_time.py [FOLDER] [--steps 60] [--repeats 3] [--policy MODEL_FOLDER]

Plain DPO is the same launcher without `--data.pref_group_key`, so the host's own trainer runs, untouched. The runs of
a repeat follow one another, forwards in one repeat and backwards in the next. A ratio is the geometric mean over
repeats of the ratio of medians, with the lowest and the highest: once by the wall clock, and once in processor time,
which other work on the machine changes less. Next to the ratios is the wall-clock time of our own code in a step: the
loss, with the host's part of it, and the log. The policy is a two-layer Llama made on the spot unless --policy names
another. The smaller the policy, the larger the share of added work.

FOLDER (default dpo-step-time-run) gets the runs with their logs. The first steps of a run warm up and do not count.
"""

import argparse
import atexit
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tiny_run import tiny_policy

BATCH, MICRO_BATCHES, LETTERS, PREF_GROUPS = 16, 4, 48, 5
WARM_UP = 5
CLOCK = "DPO_STEP_TIME"
ROBUST = ["--data.pref_group_key", "who"]
RUNS = {
    "DPO, 1 micro batch": (1, []),
    "GR-DPO exact, 1 micro batch": (1, ROBUST),
    f"DPO, {MICRO_BATCHES} micro batches": (MICRO_BATCHES, []),
    f"GR-DPO previous, {MICRO_BATCHES} micro batches": (MICRO_BATCHES, [*ROBUST, "--robust.weights", "previous"]),
    f"GR-DPO exact, {MICRO_BATCHES} micro batches": (MICRO_BATCHES, ROBUST),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("dpo-step-time-run"))
    parser.add_argument("--steps", type=int, default=60, help=f"of a run; the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder; default: a tiny model made on the spot")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2 or args.repeats < 1:
        parser.error(f"needs --steps of at least {WARM_UP + 2} and --repeats of at least 1")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"needs a new or empty folder, got {folder}, which is not empty: name another or remove it")
    policy = args.policy.resolve() if args.policy else tiny_policy(folder / "policy")
    write_pairs(folder / "pairs.jsonl", args.steps * BATCH)

    medians, own = {name: [] for name in RUNS}, {name: [] for name in RUNS}
    for repeat in range(args.repeats):
        for number, name in list(enumerate(RUNS))[:: 1 if repeat % 2 == 0 else -1]:
            steps, ours = train(policy, folder, folder / f"{repeat}-{number}", *RUNS[name])
            medians[name].append(np.median(steps, 0))
            own[name].append(np.median(ours) if len(ours) else 0.0)
            print(f"{repeat}  {name:40}  median step {1e3 * medians[name][-1][0]:9.2f} ms", flush=True)
    for name, (micro_batches, flags) in RUNS.items():
        if flags:
            plain = next(other for other, run in RUNS.items() if run == (micro_batches, []))
            ratios = np.divide(medians[name], medians[plain])
            print(f"{name:40} of {plain}: ", end="")
            for clock, column in zip(("wall", "processor"), ratios.T):
                mean = np.exp(np.log(column).mean())
                print(f"{clock} {mean:.4f}, {column.min():.4f} to {column.max():.4f}", end="; ")
            ours = np.mean(own[name])
            print(f"own code {1e3 * ours:.2f} ms a step, {ours / np.mean(medians[plain], 0)[0]:.4f}")


def write_pairs(path: Path, count: int) -> None:
    """Pairs of equal length, so that every micro batch is the same work."""
    rows = [
        {"prompt": f"{i:08} ", "chosen": "y" * LETTERS, "rejected": "n" * LETTERS, "who": f"persona {i % PREF_GROUPS}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(policy: Path, folder: Path, run: Path, micro_batches: int, flags: list[str]):
    """Trains once, into the new folder `run`.

    Returns: Seconds (steps, 2) of each step that counts, by the wall clock and of the processor; and seconds of our
        own code.

    Raises:
        SystemExit: the run failed. The message has the end of its log.
    """
    run.mkdir()
    argv = {
        "--model.model_name_or_path": policy,
        "--data.dataset": folder / "pairs.jsonl",
        "--data.prompt_key": "prompt",
        "--train.batch_size": BATCH,
        "--train.micro_batch_size": BATCH // micro_batches,
        "--ckpt.output_dir": run / "out",
    }
    words = [str(word) for pair in argv.items() for word in pair] + flags
    environment = {
        **os.environ,
        CLOCK: str(run / "clock.json"),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    with open(run / "log.txt", "w") as log:
        done = subprocess.run([sys.executable, __file__, *words], stdout=log, stderr=log, env=environment)
    if done.returncode:
        sys.exit(f"{run.name} ended with {done.returncode}:\n{(run / 'log.txt').read_text()[-3000:]}")
    clock = json.loads((run / "clock.json").read_text())
    steps = np.diff(clock["steps"][micro_batches - 1 :: micro_batches], axis=0)
    return steps[WARM_UP:], clock["ours"][WARM_UP + 1 :]


def train_by_the_clock() -> None:
    """The training run itself: the host's script through our door, with a clock after every micro batch."""
    import wrapt

    from openrlhf_pgrpo.host import doors

    steps, ours, inside = [], [], []

    @wrapt.when_imported("openrlhf.utils.deepspeed.deepspeed")
    def clock(module):
        def step(wrapped, _strategy, args, kwargs):
            wrapped(*args, **kwargs)
            steps.append((time.perf_counter(), time.process_time()))

        wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.optimizer_step", step)

    @wrapt.when_imported("openrlhf_pgrpo.host.dpo.trainer")
    def clock_our_own(module):
        def timed(wrapped, _trainer, args, kwargs):
            began = time.perf_counter()
            result = wrapped(*args, **kwargs)
            inside.append(time.perf_counter() - began)
            return result

        def last_of_step(wrapped, trainer, args, kwargs):
            timed(wrapped, trainer, args, kwargs)
            ours.append(sum(inside))
            inside.clear()

        wrapt.wrap_function_wrapper(module, "GroupRobustTrainer._loss", timed)
        wrapt.wrap_function_wrapper(module, "GroupRobustTrainer.save_logs_and_checkpoints", last_of_step)

    def write() -> None:
        Path(os.environ[CLOCK]).write_text(json.dumps({"steps": steps, "ours": ours}))

    atexit.register(write)
    doors.DPO.run()


if __name__ == "__main__":
    train_by_the_clock() if CLOCK in os.environ else main()
