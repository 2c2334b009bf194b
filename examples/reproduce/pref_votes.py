"""Does a reward model read what people stand for, if its backbone is trained? Votes on statements (docs/users.md).

    python examples/reproduce/pref_votes.py FOLDER [--data POLIS] [--policy MODEL] [--seeds 2] [--epochs 2]

People of a Polis conversation voted on statements. A quarter of the statements is held out, drawn anew by each seed;
of the rest, each person gives ten pairs. Two factorized reward models with as many base rewards see the same pairs:

    frozen     openrlhf-pgrpo factorize: base rewards are linear in the embeddings of the model as it is
    trained    train_rm, which goes on from there with the whole backbone

Both judge pairs of the statements that neither has seen, by the people whom both know. A command that is done is not
done again, so the same call goes on where one was interrupted; but for --seeds, other flags need another FOLDER. An
epoch takes about 20 minutes of two quiet cores.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "personas"), str(HERE.parent / "road"), str(HERE.parent)]

from votes import as_csv, ratings  # noqa: E402

from kept_results import once, one_set_of_flags  # noqa: E402
from models import build_policy  # noqa: E402  the demo's policy
from openrlhf_pgrpo.core.evaluation import mean_and_error  # noqa: E402

VOTES = HERE.parents[2] / "shared" / "data" / "polis" / "san_juan"
HELD_OUT, PAIRS, PAIRS_JUDGED = 0.25, 10, 20  # share of the statements; of each person
LEARNING_RATE = 2e-5
# Seed 0 chose it (and seed 1 chose 10, one base reward), when pairs of a statement could be on both sides of a fold.
L2 = 3
MODELS, MEASURES = ("frozen", "trained"), ("accuracy", "log_loss")
COMMAND = [str(Path(sys.executable).with_name("openrlhf-pgrpo"))]


def run(folder: Path, policy: Path, seed: int, epochs: int, factors: int) -> None:
    """All of one seed; its numbers are in frozen.json and trained.json."""
    folder.mkdir(exist_ok=True)
    for name, pairs in (("train", PAIRS), ("judge", PAIRS_JUDGED)):  # the same statements are held out both times
        once(folder, f"pairs-{name}", [
            *COMMAND, "pairs", "--data", folder.parent / "ratings.csv", "--hold_out", f"responses:{HELD_OUT}",
            "--seed", seed, "--pairs", pairs, "--messages",
            "--output", f"{name}-seen.jsonl", "--held_out", f"{name}-unseen.jsonl",
        ])  # fmt: skip
    once(folder, "frozen", [
        *COMMAND, "factorize", "--data", "train-seen.jsonl", "--backbone", policy, "--chat_template", policy,
        "--factors", factors, "--l2", L2, "--output", "frozen",
    ])  # fmt: skip
    once(folder, "trained", [
        sys.executable, "-m", "openrlhf_pgrpo.cli.train_rm", "--model.model_name_or_path", "frozen",
        "--reward.factors", factors, "--data.dataset", "train-seen.jsonl", "--data.prompt_key", "prompt",
        "--data.user_key", "user", "--data.apply_chat_template", "--data.max_len", 256, "--train.batch_size", 16,
        "--train.micro_batch_size", 8, "--train.max_epochs", epochs, "--train.seed", seed, "--adam.lr", LEARNING_RATE,
        "--ckpt.output_dir", "trained", "--ckpt.path", "checkpoints",
    ])  # fmt: skip
    for model in MODELS:
        once(folder, f"{model}-judges", [
            *COMMAND, "evaluate", "--model", model, "--data", "judge-unseen.jsonl", "--output", f"{model}.json",
        ])  # fmt: skip


def measured(folders: list[Path]) -> str:
    """Means over people, who count once in each seed; errors are over people, seeds together."""
    each = {model: [json.loads((one / f"{model}.json").read_text())["known"]["each"] for one in folders]
            for model in MODELS}  # fmt: skip
    rows = [(seed, person) for seed, people in enumerate(each["frozen"]) for person in people]
    person = np.array([person for _, person in rows])
    found = {
        model: {name: np.array([each[model][seed][one][name] for seed, one in rows], float) for name in MEASURES}
        for model in MODELS
    }
    found["gain"] = {name: found["trained"][name] - found["frozen"][name] for name in MEASURES}
    lines = [f"{'':8}" + "".join(f"{name:>20}" for name in MEASURES)]
    for model, values in found.items():
        numbers = ["{:.3f} ± {:.3f}".format(*mean_and_error(values[name], person)) for name in MEASURES]
        lines.append(f"{model:8}" + "".join(f"{number:>20}" for number in numbers))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=VOTES, help="A folder of Polis. Default: San Juan")
    parser.add_argument("--policy", type=Path, help="Default: SmolLM2-135M-Instruct, built from its pip package")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--factors", type=int, default=4, help="Number of base rewards. Default: 4")
    args = parser.parse_args()
    if not args.data.exists():
        raise SystemExit(f"this needs votes of a Polis conversation, got no {args.data}: name a folder with --data")
    policy = (build_policy() if args.policy is None else args.policy).resolve()
    settings = {"data": args.data.resolve(), "policy": policy, "epochs": args.epochs, "factors": args.factors}
    one_set_of_flags(args.folder, **settings)
    (args.folder / "ratings.csv").write_text(as_csv(ratings(args.data)))
    folders = [args.folder.resolve() / f"seed-{seed}" for seed in range(args.seeds)]
    for seed, folder in enumerate(folders):
        run(folder, policy, seed, args.epochs, args.factors)
    print(measured(folders))


if __name__ == "__main__":
    main()
