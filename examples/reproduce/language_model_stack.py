"""Does the real stack learn what the language-model lab learns? One cell of the lab through OpenRLHF, Ray and vLLM.

    python examples/reproduce/language_model_stack.py FOLDER [--model STORIES260K] [--seeds 3] [--steps 60]

The lab (`examples/language_model_lab.py`) samples, rewards and updates in one process. Here the same prompts, rewards,
learning rate and estimator go through the command that users type: vLLM writes, DeepSpeed trains. Attention heads are
widened first, because vLLM's smallest are (`examples/wider_heads.py`). Whatever the two do differently, such as bf16
and the order of prompts, is within the error if both are right. Saved models are judged by the lab's own function.

What is done is not done again: the same call goes on where one was interrupted. Another model or number of steps
needs another FOLDER. A run takes one minute to three
and a half of two cores, with the saved models' judgement.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import language_model_lab as lab  # noqa: E402
import shown  # noqa: E402
from estimator_lab import HOST  # noqa: E402
from kept_results import clear_unless_done, once, one_set_of_flags  # noqa: E402
from openrlhf_pgrpo.core.estimator import advantage_estimators  # noqa: E402
from openrlhf_pgrpo.files import whole_file  # noqa: E402
from wider_heads import widen  # noqa: E402

CELL = lab.CELLS[lab.TUNED]


def reward_func(queries, prompts, labels):
    """The lab's reward, as the host asks for it; each label holds what the reward depends on besides the text."""
    import torch

    rewards = []
    for query, asked in zip(queries, map(json.loads, labels), strict=True):
        _, prompt, rest = query.partition(asked["prompt"])
        if not prompt:
            raise ValueError(f"needs texts that begin with their prompt {asked['prompt']!r}, got {query!r}")
        answer = rest.partition("<s>")[0]
        value = lab.LIKINGS[asked["liking"]](answer) / asked["spread"]
        noise = CELL.difficulty * asked["difficulty"] + CELL.noise * np.random.default_rng().standard_normal()
        rewards.append(asked["offset"] + asked["scale"] * (value + noise))
    rewards = torch.tensor(rewards)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}


def rows(spread: np.ndarray, seed: int, steps: int) -> list[dict]:
    """Prompts as the lab draws them. The host adds no start token, so it stands in the text."""
    rng = np.random.default_rng(seed)
    share, scale, offset, liking = CELL.population(rng)
    names, found = lab.people(CELL.groups), []
    for _ in range(steps * lab.BATCH // CELL.samples):
        g = int(rng.choice(CELL.groups, p=share))
        text = lab.prompt(names[g], rng.choice(lab.TRAINED))
        asked = {"prompt": text, "liking": int(liking[g]), "spread": spread[liking[g]], "scale": scale[g],
                 "offset": offset[g], "difficulty": rng.standard_normal()}  # fmt: skip
        found.append({"prompt": f"<s>{text}", "person": names[g], "wish": json.dumps(asked)})
    return found


def command(folder: Path, policy: Path, estimator: str, seed: int, steps: int) -> list:
    """The training, as a user would type it; the learning rate stays as it is, as in the lab."""
    ours = ["--data.pref_group_key", "person"] if estimator not in HOST else []
    return [
        sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", "--actor.model_name_or_path", policy,
        "--data.prompt_dataset", folder / "prompts.jsonl", "--data.input_key", "prompt", "--data.label_key", "wish",
        "--reward.remote_url", Path(__file__).resolve(), "--advantage_estimator", estimator, *ours,
        "--vllm.num_engines", 1, "--actor.num_gpus_per_node", 1, "--rollout.batch_size", lab.BATCH // CELL.samples,
        "--rollout.n_samples_per_prompt", CELL.samples, "--rollout.micro_batch_size", lab.BATCH,
        "--rollout.max_new_tokens", lab.TOKENS, "--data.max_len", 128, "--train.batch_size", lab.BATCH,
        "--train.micro_batch_size", lab.BATCH, "--train.seed", seed, "--algo.kl.init_coef", 0,
        "--actor.adam.lr", lab.RATE, "--actor.lr_warmup_ratio", 0, "--actor.min_lr_ratio", 1,
        "--ckpt.save_steps", steps // lab.EVALUATIONS, "--ckpt.save_hf", "--ckpt.path", folder / "checkpoints",
        "--ckpt.output_dir", folder / "trained", "--logger.metrics_path", folder / "metrics.jsonl",
    ]  # fmt: skip


def run(folder: Path, policy: Path, stories: lab.Writer, estimator: str, seed: int, steps: int) -> np.ndarray:
    """Scores (evaluations, likings) of one run."""
    from transformers import AutoModelForCausalLM

    scores = folder / "scores.json"
    if not scores.exists():
        words = command(folder, policy, estimator, seed, steps)
        clear_unless_done(folder, "train", words)
        lines = [json.dumps(row) + "\n" for row in rows(stories.spread, seed, steps)]
        (folder / "prompts.jsonl").write_text("".join(lines))
        once(folder, "train", words)
        every = steps // lab.EVALUATIONS
        saved = [folder / "checkpoints" / f"global_step{step}_hf" for step in range(every, steps, every)]
        names, liking = lab.people(CELL.groups), CELL.population(np.random.default_rng(seed))[3]
        found = []
        for path in (policy, *saved, folder / "trained"):
            model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
            found.append(lab.evaluate(stories, model, names, liking, seed))
        with whole_file(scores) as file:
            file.write(json.dumps(found).encode())
    return np.array(json.loads(scores.read_text()))


def table(estimator: str, steps: int, stack: np.ndarray, expected: np.ndarray) -> str:
    """Means over seeds and likings with standard errors over seeds; curves (seeds, evaluations, likings)."""
    lines = [f"\n{estimator}{'':4}{'step':>6}{'real stack':>16}{'lab':>16}{'difference / its error':>26}"]
    for row, (ours, theirs) in enumerate(zip(stack.mean(2).T, expected.mean(2).T, strict=True)):
        errors = [shown.error(values) for values in (ours, theirs)]
        means = [f"{values.mean():.3f} ± {error:.3f}" for values, error in zip((ours, theirs), errors)]
        apart = (ours.mean() - theirs.mean()) / np.hypot(*errors)
        step = row * steps // lab.EVALUATIONS
        lines.append(f"{'':{len(estimator) + 4}}{step:6}{means[0]:>16}{means[1]:>16}{apart:>26.1f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=lab.MODEL, help="a folder with stories260K")
    parser.add_argument("--estimators", nargs="+", default=["group_norm", "pgrpo_eb"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lab_seeds", type=int, default=10)
    parser.add_argument("--lab", type=Path, help="the lab's folder. Default: FOLDER/lab")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    if min(args.seeds, args.lab_seeds) < 2:
        parser.error(f"--seeds and --lab_seeds need at least 2, got {args.seeds} and {args.lab_seeds}")
    if args.steps < lab.EVALUATIONS or args.steps % lab.EVALUATIONS:
        parser.error(f"--steps needs a multiple of {lab.EVALUATIONS}, the number of evaluations, got {args.steps}")
    known = [*HOST, *advantage_estimators()]
    if unknown := {*args.estimators}.difference(known):
        parser.error(f"--estimators needs names that the lab has, too, from {known}, got {sorted(unknown)}")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model needs a folder with stories260K, got none at {args.model}")
    folder = args.folder.resolve()
    one_set_of_flags(folder, model=args.model.resolve(), steps=args.steps, rate=lab.RATE)
    policy, stories = folder / "policy", lab.writer(args.model)
    if not policy.exists():
        begun = folder / "policy.new"
        shutil.rmtree(begun, ignore_errors=True)
        widen(args.model, begun)
        # A story ends with the start token, and vLLM stops at the tokenizer's end.
        stories.tokenizer.eos_token = stories.tokenizer.bos_token
        stories.tokenizer.save_pretrained(begun)
        begun.rename(policy)
    jobs = {
        estimator: lab.jobs_of(CELL, estimator, lab.RATE, args.steps, range(args.lab_seeds))
        for estimator in args.estimators
    }
    for estimator, (job, *_) in jobs.items():
        one_set_of_flags(folder / estimator, **job.settings())
    stack = {
        estimator: np.stack([
            run(folder / estimator / f"seed-{seed}", policy, stories, estimator, seed, args.steps)
            for seed in range(args.seeds)
        ])
        for estimator in args.estimators
    }  # fmt: skip
    where = args.lab or folder / "lab"
    lab.run(where, args.model, [job for each in jobs.values() for job in each])
    for estimator in args.estimators:
        expected = np.stack([lab.curve(where, job) for job in jobs[estimator]])
        print(table(estimator, args.steps, stack[estimator], expected))


if __name__ == "__main__":
    main()
