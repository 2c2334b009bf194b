"""Whole training steps with pgrpo and with group_norm: real OpenRLHF, Ray, vLLM and DeepSpeed, same seeds and sizes.

    python examples/benchmarks/step_time.py [FOLDER] [--steps 60] [--repeats 3] [--policy MODEL_FOLDER]

The two must do the same work for their times to be comparable. So every answer has the same length (vLLM ignores the
end token), the learning rate is 0, so that both always sample from the same policy, and the order of the two runs
alternates. The policy is a two-layer Llama made on the spot unless --policy names another. The smaller the policy, the
larger the share of added work. group_norm runs through the same launcher, which a machine without a GPU needs, but
without --data.pref_group_key, so that the host's own code computes the advantages.

It prints two answers:

* the ratio of the times of a step, from one row of metrics.jsonl to the next, with logging: the geometric mean over
  pairs of runs of the ratio of their medians, with a bootstrap interval over pairs and steps;
* the time of the add-on's own code in a step, by its clock (`probe.py`), minus the time of the host's code that it
  replaces. Other work on the machine changes the first answer by percents, and this one hardly.

FOLDER (default step-time-run) gets the runs with their logs. The first steps of a run, which warm up, do not count.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tiny_run import PROMPTS, TOKENS, flags, new_folder, run_to_the_end, tiny_policy, write_data

HERE = Path(__file__).resolve().parent
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("step-time-run"))
    parser.add_argument("--steps", type=int, default=60, help=f"of a run; the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder; default: a tiny model made on the spot")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2 or args.repeats < 1:
        parser.error(f"needs --steps of at least {WARM_UP + 2} and --repeats of at least 1")
    folder = new_folder(parser, args.folder)
    policy = args.policy or tiny_policy(folder / "policy")
    write_data(folder, args.steps * PROMPTS)

    pairs = []
    for repeat in range(args.repeats):
        pair = {}
        for estimator in ("pgrpo", "group_norm")[:: 1 if repeat % 2 == 0 else -1]:
            run = folder / f"{repeat}-{estimator}"
            group_key = ["--data.pref_group_key", "persona"] if estimator == "pgrpo" else []
            train(policy, folder, run, ["--advantage_estimator", estimator, *group_key])
            pair[estimator] = read(run)
            print(f"{run.name:14}  median step {1e3 * np.median(pair[estimator]['step']):8.1f} ms", flush=True)
        pairs.append(pair)
    print(report(pairs))


def train(policy: Path, folder: Path, run: Path, estimator_flags: list[str]) -> None:
    """One training run into the new folder `run`."""
    run.mkdir()
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *flags(policy, folder, run)]
    command += ["--vllm.num_engines", "1", "--pgrpo.plugin", str(HERE / "probe.py"), *estimator_flags]
    run_to_the_end(command, run / "log.txt", {"STEP_TIME_PROBE": str(run / "probe.jsonl")})


# ---- results --------------------------------------------------------------------------------------------------------


def read(run: Path) -> dict[str, np.ndarray]:
    """Seconds of each step that counts: the whole step, and in it the advantages and the add-on's log."""
    rows, probed = (
        [json.loads(line) for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "probe.jsonl")
    )
    lengths = {row["train"]["response_length"] for row in rows}
    if lengths != {TOKENS}:
        raise SystemExit(f"equal work needs answers of {TOKENS} tokens each, got means of {sorted(lengths)} in {run}")
    seconds = {"step": np.diff([row["time"] for row in rows])}
    for part in ("advantages", "log"):
        seconds[part] = np.array([row["seconds"] for row in probed if row["part"] == part])[1:]
    return {part: values[WARM_UP - 1 :] for part, values in seconds.items()}


def report(pairs: list[dict]) -> str:
    rng = np.random.default_rng(0)

    def resampled():
        drawn = [pairs[i] for i in rng.integers(len(pairs), size=len(pairs))]
        return [{name: {"step": rng.choice(run["step"], len(run["step"]))} for name, run in p.items()} for p in drawn]

    low, high = np.quantile([ratio(resampled()) for _ in range(2000)], [0.025, 0.975])

    def median(estimator: str, part: str) -> float:
        return 1e3 * np.median(np.concatenate([pair[estimator][part] for pair in pairs]))

    step, host = median("group_norm", "step"), median("group_norm", "advantages")
    advantages, log = median("pgrpo", "advantages"), median("pgrpo", "log")
    own = advantages - host + log
    return "\n".join(
        [
            "",
            f"steps that count: {sum(len(run['step']) for pair in pairs for run in pair.values())}, "
            f"in {2 * len(pairs)} runs",
            f"step time, pgrpo / group_norm:  {ratio(pairs):.4f}   95 % interval {low:.4f} to {high:.4f}",
            f"by the add-on's clock:          {1 + own / step:.4f}   {own:.2f} ms of a step of {step:.0f} ms: "
            f"advantages and metrics {advantages:.2f} - {host:.2f} (host's), log {log:.2f}",
        ]
    )


def ratio(pairs: list[dict]) -> float:
    medians = [[np.median(pair[name]["step"]) for name in ("pgrpo", "group_norm")] for pair in pairs]
    return float(np.exp(np.mean([np.log(ours / host) for ours, host in medians])))


if __name__ == "__main__":
    main()
