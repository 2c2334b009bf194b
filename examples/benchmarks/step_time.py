"""Whole training steps with pgrpo beside group_norm: real OpenRLHF, Ray, vLLM and DeepSpeed, same seeds, same sizes.

    python examples/benchmarks/step_time.py [FOLDER] [--steps 60] [--repeats 3] [--policy MODEL_FOLDER]

The two must do the same work for their times to be comparable. So every answer has the same length (vLLM ignores the
end token), the learning rate is 0, so that both go on sampling from the same policy, and the runs alternate, the one
first and then the other. The policy is a two-layer Llama made on the spot unless --policy names another: the smaller
the policy, the larger the share of whatever is added to a step. group_norm runs through the same launcher, which a
machine without a GPU needs, but without --pgrpo.group_key: then the advantages are the host's own code.

Two answers are printed:

* the ratio of the times of a step, from one row of metrics.jsonl to the next, logging included: the geometric mean
  over pairs of runs of the ratio of their medians, with a bootstrap interval over pairs and steps;
* what the add-on's own code takes of a step, by its clock (`probe.py`), less what the host's own code takes in its
  place. The noise of a machine moves the first answer by percents, this one hardly.

FOLDER (default step-time-run) gets the runs with their logs. The first steps of a run, which warm up, do not count.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PREF_GROUPS, PROMPTS, SAMPLES, TOKENS = 8, 16, 4, 32  # per step, per prompt, per answer
WARM_UP = 3
LONGEST_RUN = 1800  # seconds
MARK = "OPENRLHF_PGRPO_BENCHMARK_RUN"

REWARD = """
import torch

def reward_func(queries, prompts, labels):
    distinct = float(len(set(queries[0][len(prompts[0]):])))
    return {"rewards": torch.tensor([distinct]), "scores": torch.tensor([distinct]), "extra_logs": {}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("step-time-run"))
    parser.add_argument("--steps", type=int, default=60, help=f"of a run; the first {WARM_UP} do not count")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder; default: a tiny model made on the spot")
    args = parser.parse_args()
    if args.steps < WARM_UP + 2 or args.repeats < 1:
        parser.error(f"needs --steps of at least {WARM_UP + 2} and --repeats of at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the training run is ended with us
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"needs a new or empty folder, got {folder}, which holds something: name another or remove it")
    policy = args.policy or tiny_policy(folder / "policy")
    write_data(folder, args.steps)

    pairs = []
    for repeat in range(args.repeats):
        pair = {}
        for estimator in ("pgrpo", "group_norm")[:: 1 if repeat % 2 == 0 else -1]:
            run = folder / f"{repeat}-{estimator}"
            flags = ["--pgrpo.group_key", "persona"] if estimator == "pgrpo" else []
            train(policy, folder, run, ["--advantage_estimator", estimator, *flags])
            pair[estimator] = read(run)
            print(f"{run.name:14}  median step {1e3 * np.median(pair[estimator]['step']):8.1f} ms", flush=True)
        pairs.append(pair)
    print(report(pairs))


# ---- what is trained ------------------------------------------------------------------------------------------------


def tiny_policy(folder: Path) -> Path:
    """A random Llama over bytes; heads of 32, the smallest that vLLM has on a CPU."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_data(folder: Path, steps: int) -> None:
    rows = [{"prompt": f"{i:05} says ", "persona": f"persona {i % PREF_GROUPS}"} for i in range(steps * PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({**row, "label": row["persona"]}) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


def train(policy: Path, folder: Path, run: Path, estimator_flags: list[str]) -> None:
    """One training run into the new folder `run`.

    Raises:
        SystemExit: it failed or did not end; the message holds the end of its log.
    """
    run.mkdir()
    flags = {
        "--actor.model_name_or_path": policy,
        "--data.prompt_dataset": folder / "prompts.jsonl",
        "--data.input_key": "prompt",
        "--data.label_key": "label",
        "--data.max_len": 64,
        "--reward.remote_url": folder / "reward.py",
        "--pgrpo.plugin": HERE / "probe.py",
        "--vllm.num_engines": 1,
        "--rollout.batch_size": PROMPTS,
        "--rollout.n_samples_per_prompt": SAMPLES,
        "--rollout.micro_batch_size": 16,
        "--rollout.max_new_tokens": TOKENS,
        "--train.batch_size": PROMPTS * SAMPLES,
        "--train.micro_batch_size": 16,
        "--actor.adam.lr": 0,
        "--algo.kl.init_coef": 0,
        "--ckpt.path": run / "checkpoints",
        "--ckpt.output_dir": run / "model",
        "--pgrpo.metrics_path": run / "metrics.jsonl",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words, *estimator_flags]
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "STEP_TIME_PROBE": str(run / "probe.jsonl")}
    log = run / "log.txt"
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            code = f"no end after {LONGEST_RUN} seconds"
        finally:
            process.kill()
            end_all(f"{MARK}={mark}".encode())
            process.wait()
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise SystemExit(f"a benchmark needs runs that succeed, got {code} from {run.name}; {log} ends:\n{tail}")


def end_all(mark: bytes) -> None:
    """Ends all processes with this mark in their environment, by their ids: Ray's and vLLM's outlive the driver."""
    while pids := list(marked(mark)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked(mark: bytes):
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                yield int(entry.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or not ours


# ---- what comes out -------------------------------------------------------------------------------------------------


def read(run: Path) -> dict[str, np.ndarray]:
    """Seconds of each step that counts: the whole step, and in it those of the advantages and of the add-on's log."""
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
