"""Group-robust preference optimisation (arXiv 2405.20304) on what five countries say, with SmolLM2-135M itself.

    python examples/reproduce/group_robust_opinions_lora.py FOLDER [--data FOLDER] [--epochs 1] [--policy FOLDER]

The same cells as in `group_robust_opinions.py`, now as text: the prompt is the question and the country, the chosen
answer is the most frequent one there, the rejected one is any other option, at random. Each method is one run of
`python -m openrlhf_pgrpo.cli.train_dpo` with LoRA; pairs, their order and all other settings are the same. DPO and
IPO run with a weight of one for every pair (`--robust.chi 0 --robust.mu share`). This changes nothing, but the
trainer then reports them by country too. The evaluation after every epoch is on questions never trained on, and
nothing is chosen by it. Standard errors are over the pairs of a country, because each method has one run.

FOLDER gets the pairs and the runs. A finished run is not repeated, so an interrupted command can be repeated. Other
flags than --methods need another FOLDER.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

import group_robust_opinions as opinions
from kept_results import clear_unless_done, once, one_set_of_flags
from openrlhf_pgrpo.files import write_whole

METHODS = {
    "DPO": ["--robust.chi", "0", "--robust.mu", "share"],
    "GR-DPO": ["--robust.eta", "0.1"],
    "IPO": ["--model.ipo_enable", "--robust.chi", "0", "--robust.mu", "share"],
    "IS-IPO": ["--model.ipo_enable", "--robust.chi", "0"],
    "GR-IPO": ["--model.ipo_enable", "--robust.eta", "0.01"],
}
BATCH = 16
SETTINGS = {
    "--data.prompt_key": "prompt",
    "--data.max_len": 160,
    "--data.pref_group_key": "country",
    "--model.beta": 0.1,
    "--ds.lora.rank": 16,
    "--ds.lora.alpha": 32,
    "--adam.lr": 5e-4,
    "--train.batch_size": BATCH,
    "--train.micro_batch_size": BATCH,
    "--eval.split": "train",
    "--logger.logging_steps": 1,
}


def write_pairs(cells: list[opinions.Cell], folder: Path, seed: int) -> list[int]:
    """Writes train.jsonl and test.jsonl, 80 and 20 % of the questions, one pair for each cell; returns their sizes."""
    rng = np.random.default_rng(seed)
    names = sorted({cell.question for cell in cells})
    trained = set(rng.permutation(names)[: round(0.8 * len(names))])
    rows = {"train": [], "test": []}
    for cell in cells:
        best = int(np.argmax(cell.shares))
        rejected = rng.choice(np.delete(np.arange(len(cell.options)), best))
        pair = {"chosen": f" {cell.options[best]}", "rejected": f" {cell.options[rejected]}", "country": cell.country}
        prompt = f"{cell.question}\nMost people in {cell.country} answer:"
        rows["train" if cell.question in trained else "test"].append({"prompt": prompt, **pair})
    for name, pairs in rows.items():
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(pair) + "\n" for pair in pairs))
    return [len(pairs) for pairs in rows.values()]


def evaluations(run: Path) -> list[dict]:
    """The rows of a run's metrics that hold an evaluation."""
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [row for row in rows if "evaluation" in row]


def train(name: str, folder: Path, policy: Path, steps: int, epochs: int, seed: int) -> list[dict]:
    """Trains the method `name`, unless that is done already. Returns its evaluations, one per epoch.

    Raises:
        SystemExit: the run failed; the message names its log.
    """
    run = folder / name
    settings = {
        **SETTINGS,
        "--model.model_name_or_path": policy,
        "--data.dataset": folder / "train.jsonl",
        "--eval.dataset": folder / "test.jsonl",
        "--eval.steps": steps,
        "--train.max_epochs": epochs,
        "--train.seed": seed,
        "--ckpt.output_dir": run,
    }
    words = [word for pair in settings.items() for word in pair] + METHODS[name]
    command = [sys.executable, "-m", "openrlhf_pgrpo.cli.train_dpo", *words]
    clear_unless_done(run, "train", command)
    once(run, "train", command)
    return evaluations(run)


def report(found: dict[str, list[dict]]) -> None:
    """Loss and accuracy by country after each epoch."""
    for epoch, rows in enumerate(zip(*found.values()), start=1):
        countries = sorted(name for name, group in rows[0]["pref_groups"].items() if "eval_loss" in group)
        for key, worst in (("eval_loss", np.max), ("eval_accuracy", np.min)):
            print(f"\n{key} after epoch {epoch}")
            print(f"{'':8}" + "".join(f"{head:>15}" for head in (*countries, "worst", "average", "gap")))
            for name, row in zip(found, rows):
                values = np.array([row["pref_groups"][country][key] for country in countries])
                line = (*values, worst(values), values.mean(), np.ptp(values))
                print(f"{name:8}" + "".join(f"{value:15.3f}" for value in line))
    pairs = {country: int(rows[0]["pref_groups"][country]["eval_pairs"]) for country in countries}
    print(f"\nevaluated pairs: {pairs}; an accuracy of .5 has a standard error of", end=" ")
    print(f"{0.5 / math.sqrt(max(pairs.values())):.3f} to {0.5 / math.sqrt(min(pairs.values())):.3f}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=opinions.DATA, help=f"the folder with {opinions.FILE}")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder; default: the demo's, built once")
    args = parser.parse_args(argv)
    if not (args.data / opinions.FILE).is_file():
        print(f"skipped: needs {opinions.FILE}, got none in {args.data}; name its folder by --data or $OPINIONS_DATA")
        return
    cells = opinions.read(args.data / opinions.FILE)
    cells = opinions.sharing(cells, opinions.most_shared(cells))
    folder = args.folder.resolve()
    policy = (args.policy or opinions.policy()).resolve()
    one_set_of_flags(folder, data=args.data.resolve(), policy=policy, epochs=args.epochs, seed=args.seed)
    trained, _ = write_pairs(cells, folder, args.seed)
    found = {}
    for name in args.methods:
        found[name] = train(name, folder, policy, trained // BATCH, args.epochs, args.seed)
        print(f"{name}: {found[name][-1]['evaluation']}", flush=True)
    report(found)


if __name__ == "__main__":
    main(sys.argv[1:])
