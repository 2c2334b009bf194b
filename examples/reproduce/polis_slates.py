"""Does a policy learn which statements people agree with, from their votes, through the real stack? (docs/pgrpo.md)

    python examples/reproduce/polis_slates.py FOLDER [--data POLIS] [--estimators group_norm pgrpo_eb] [--seeds 3]
    python examples/reproduce/polis_slates.py FOLDER --estimators group_robust pgrpo_eb:min_count=16
    python examples/reproduce/polis_slates.py FOLDER --scales           # the minority marks harshly: 5 vote - 10
    python examples/reproduce/polis_slates.py FOLDER --groups random    # control: what the policy is told is drawn
    python examples/reproduce/polis_slates.py FOLDER --quick            # two steps of one seed: does it run?

A slate is two statements on which one person of a Polis conversation voted differently. The policy is told the
person's preference group and answers with one token, the number of a statement. The reward is the person's vote on it:
agree 1, pass 0, disagree -1. Another token names none and earns the lower vote, so that naming none never pays. The
better statement is the first in every other slate.

The longer half of the statements tells the preference groups, the shorter half makes the slates: nobody's preference
group follows from a vote that is rewarded or judged. Each seed holds out three people in ten, and a third of the
shorter statements. The people held out judge, on statements that training showed and on those that it never showed:

    random              any statement
    one reward for all  the one with the higher mean vote of the people trained on, who voted on all statements
    its group's mean    the same of those whom the policy is told to be alike
    best possible       the one that the person prefers
    untrained           the policy before training; `likelier` always names what it finds likelier in both orders
    gain                trained minus untrained, on the same slates

A policy's chance of naming a statement is computed and not sampled. It is the mean over both orders, so that always
naming the first is worth as much as `random`. A policy that mostly names one place hides what it has learned of
statements; `likelier` shows it. What is done is not done again: the same call goes on where one was interrupted. A
FOLDER is for one set of flags. A step took 16 seconds of two cores with instructions for bfloat16, and 50 of two
without AVX-512.

Axes: U people, S statements of slates, P pairs of them, G preference groups.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "personas"), str(HERE.parent / "road"), str(HERE.parent), str(HERE)]

from votes import is_polis, ratings  # noqa: E402

from kept_results import clear_unless_done, once, one_set_of_flags  # noqa: E402
from models import build_policy  # noqa: E402  the demo's policy
from openrlhf_pgrpo.core.annotations import Annotations  # noqa: E402
from openrlhf_pgrpo.core.differences import Differences  # noqa: E402
from openrlhf_pgrpo.core.evaluation import mean_and_error  # noqa: E402
from openrlhf_pgrpo.core.factorization import fit  # noqa: E402
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions  # noqa: E402
from openrlhf_pgrpo.files import whole_file  # noqa: E402
from polis_slates_reward import NUMBERS  # noqa: E402
from pref_votes import VOTES  # noqa: E402

GROUPS = ("majority", "minority")
SCALES = ((1.0, 0.0), (5.0, -10.0))  # of the votes of each preference group, with --scales
FACTORS, PAIRS = 2, 40  # base rewards that tell the preference groups; pairs of each person that they are fitted on
PEOPLE_HELD_OUT, STATEMENTS_HELD_OUT = 0.3, 1 / 3
PROMPTS_PER_STEP, SAMPLES_PER_PROMPT = 16, 2
LEARNING_RATE = 1e-5  # with 2e-5 and more, it soon names always the first, or always the second
JUDGED = 60  # pairs of statements, of those that training showed and of the others

# ---- people, statements and slates ----------------------------------------------------------------------------------


class World(NamedTuple):
    """What a seed fixes.

    votes (U, S), NaN where there is none. group, told (U,): a person's preference group, and the one that the policy
    is told. known (U,): people trained on. shown (S,): statements that training shows.
    """

    votes: np.ndarray
    texts: list[str]
    group: np.ndarray
    told: np.ndarray
    known: np.ndarray
    shown: np.ndarray


def read(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Votes (people, statements) of a conversation, and the statements, the shortest first."""
    rows = ratings(folder)
    texts = sorted({row["response"] for row in rows}, key=lambda text: (len(text.split()), text))
    person = {name: number for number, name in enumerate(dict.fromkeys(row["user"] for row in rows))}
    statement = {text: number for number, text in enumerate(texts)}
    votes = np.full((len(person), len(texts)), np.nan)
    for row in rows:
        votes[person[row["user"]], statement[row["response"]]] = row["rating"]
    return votes, texts


def preferred(votes: np.ndarray) -> np.ndarray:
    """The pairs (2, P) of statements on which a person with votes (S,) voted differently."""
    voted = np.flatnonzero(~np.isnan(votes))
    first, second = voted[np.stack(np.triu_indices(len(voted), 1))]
    return np.stack([first, second])[:, votes[first] != votes[second]]


def preference_groups(votes: np.ndarray) -> np.ndarray:
    """0 for the majority and 1 for the minority (U,), found in votes (U, statements) of people who all differ in them
    at least once."""
    from openrlhf_pgrpo.people.groups import cluster

    rng, drawn = np.random.default_rng(0), []
    for person, own in enumerate(votes):
        pairs = preferred(own)
        for first, second in pairs[:, rng.permutation(pairs.shape[1])[:PAIRS]].T:
            drawn.append((person, first, second, own[first] > own[second]))
    user, first, second, preference = np.array(drawn, int).T
    pairs = Differences.between(np.eye(votes.shape[1]), first, second)
    annotations = Annotations(user, np.arange(len(drawn)), preference, [str(person) for person in range(len(votes))])
    return cluster(fit(pairs, annotations, FACTORS).coefficients, len(GROUPS)).of_users.argmax(1)


def draw_world(votes: np.ndarray, texts: list[str], group: np.ndarray, seed: int, at_random: bool) -> World:
    rng = np.random.default_rng(seed)
    people, statements = votes.shape
    known = rng.permutation(people) >= round(PEOPLE_HELD_OUT * people)
    shown = rng.permutation(statements) >= round(STATEMENTS_HELD_OUT * statements)
    told = rng.permutation(group) if at_random else group
    return World(votes, texts, group, told, known, shown)


def prompt(group: int, first: str, second: str) -> list[dict]:
    asked = "Which do you agree with more? Answer with a number, 1 or 2."
    return [
        {"role": "system", "content": f"You speak for the {GROUPS[group]}."},
        {"role": "user", "content": f"{asked}\n1: {first}\n2: {second}"},
    ]


def training_slates(world: World, count: int, scales: bool, seed: int) -> Iterator[dict]:
    """Slates of people and pairs drawn at random; the label holds what each statement earns."""
    rng = np.random.default_rng(seed)
    pairs = {person: preferred(np.where(world.shown, world.votes[person], np.nan))
             for person in np.flatnonzero(world.known)}  # fmt: skip
    people = [person for person, own in pairs.items() if own.size]
    for number in range(count):
        person = rng.choice(people)
        pair = pairs[person][:, rng.integers(pairs[person].shape[1])]
        better_first = pair[np.argsort(-world.votes[person, pair])]
        slate = better_first if number % 2 else better_first[::-1]
        told = world.told[person]
        scale, offset = SCALES[told] if scales else (1.0, 0.0)
        yield {
            "prompt": prompt(told, *(world.texts[one] for one in slate)),
            "votes": json.dumps([scale * vote + offset for vote in world.votes[person, slate]]),
            "pref_group": GROUPS[told],
        }


def judged_pairs(world: World, seed: int) -> np.ndarray:
    """Pairs (2, P) of statements that training showed, and then as many or fewer of the others."""
    rng, drawn = np.random.default_rng(seed), []
    differ = [preferred(own) for own in world.votes[~world.known]]
    pairs = np.unique(np.concatenate(differ, 1), axis=1)
    for shown in (True, False):
        these = pairs[:, (world.shown[pairs] == shown).all(0)]
        drawn.append(these[:, rng.permutation(these.shape[1])[:JUDGED]])
    return np.concatenate(drawn, 1)


# ---- a policy: trained, and asked -----------------------------------------------------------------------------------


def training_command(policy: Path, estimator: str, seed: int, steps: int) -> list[str]:
    """The training, as a user would type it. After a colon the estimator may have options, `pgrpo:min_count=16`."""
    name, _, rest = estimator.partition(":")
    options = [pair.partition("=") for pair in rest.split(",") if pair]
    flags = {
        "--advantage_estimator": name,
        **{f"--pgrpo.{option}": value for option, _, value in options},
        "--actor.model_name_or_path": policy,
        "--reward.remote_url": HERE / "polis_slates_reward.py",
        "--data.prompt_dataset": "prompts.jsonl",
        "--data.input_key": "prompt",
        "--data.label_key": "votes",
        "--data.pref_group_key": "pref_group",
        "--data.max_samples": steps * PROMPTS_PER_STEP,
        "--data.max_len": 192,
        "--vllm.num_engines": 1,
        "--actor.num_gpus_per_node": 2,  # two ranks; without a GPU one per core
        "--rollout.batch_size": PROMPTS_PER_STEP,
        "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
        "--rollout.micro_batch_size": 8,
        "--rollout.max_new_tokens": 1,
        "--train.batch_size": PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
        "--train.micro_batch_size": 8,
        "--train.seed": seed,
        "--actor.adam.lr": LEARNING_RATE,
        "--algo.kl.init_coef": 0,
        "--ckpt.output_dir": "trained",
        "--ckpt.path": "checkpoints",
        "--logger.metrics_path": "metrics.jsonl",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words, "--data.apply_chat_template"]


def chances(model: Path, world: World, pairs: np.ndarray) -> np.ndarray:
    """The chance of each number (G, P, 2 orders, 2 numbers) as the answer of a model to each preference group's slates
    of pairs (2, P); in the second order, the second statement of the pair is number 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    numbers = tokenizer.convert_tokens_to_ids(NUMBERS)
    texts = [[world.texts[one] for one in slate] for pair in pairs.T for slate in (pair, pair[::-1])]
    chats = [prompt(group, *slate) for group in range(len(GROUPS)) for slate in texts]
    asked = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    found = []
    for start in range(0, len(asked), 16):
        batch = tokenizer(asked[start : start + 16], return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            last = network(**inputs, logits_to_keep=1).logits[:, -1]
        found.append(last.double().softmax(-1)[:, numbers].numpy())
    return np.concatenate(found).reshape(len(GROUPS), -1, 2, 2)


def judge(folder: Path, model: Path, world: World, pairs: np.ndarray) -> np.ndarray:
    """The chances of a model, kept in the folder."""
    kept = folder / "chances.json"
    if not kept.is_file():
        print(f"{folder.name}: judged ...", flush=True)
        found = chances(model, world, pairs)
        with whole_file(kept) as file:
            file.write(json.dumps(found.tolist()).encode())
    return np.array(json.loads(kept.read_text()))


def run(folder: Path, policy: Path, world: World, estimator: str, seed: int, steps: int, scales: bool) -> np.ndarray:
    """One training: its chances (G, P, 2, 2). Of its weights nothing is kept."""
    pairs = judged_pairs(world, seed)
    if not (folder / "chances.json").is_file():
        command = training_command(policy, estimator, seed, steps)
        clear_unless_done(folder, "train", command)
        rows = training_slates(world, steps * PROMPTS_PER_STEP, scales, seed)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        once(folder, "train", command)
    found = judge(folder, folder / "trained", world, pairs)
    shutil.rmtree(folder / "trained", ignore_errors=True)
    return found


# ---- what is compared -----------------------------------------------------------------------------------------------


def share_of_first(chances: np.ndarray, likelier: bool = False) -> np.ndarray:
    """How often (G, P) the first statement of a pair is named, if one is: the mean over both orders. With `likelier`,
    1 if that is more than half, and 0 if it is less."""
    share = chances / chances.sum(-1, keepdims=True)
    first = (share[..., 0, 0] + share[..., 1, 1]) / 2
    return (1 + np.sign(np.round(first - 0.5, 12))) / 2 if likelier else first  # an even chance has rounding errors


def votes_named(world: World, pairs: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Mean vote (U, 2) of each person held out on the statements named: those shown in training, and the others.

    `first` (U, P) or (P,) is how often the first statement of a pair is named. NaN where a person judges no pair.
    """
    of_pair = world.votes[:, pairs]  # (U, 2, P)
    judged = (np.abs(of_pair[:, 0] - of_pair[:, 1]) > 0) & ~world.known[:, None]
    vote = np.where(judged, first * of_pair[:, 0] + (1 - first) * of_pair[:, 1], 0)
    shown = world.shown[pairs[0]]
    with np.errstate(invalid="ignore"):
        return np.stack([vote[:, part].sum(1) / judged[:, part].sum(1) for part in (shown, ~shown)], 1)


def references(world: World, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """How often (U, P) each reference names the first statement; of equals it names each half the time."""

    def mean_vote(people: np.ndarray) -> np.ndarray:
        count = (~np.isnan(world.votes[people])).sum(0)
        return np.where(count, np.nansum(world.votes[people], 0) / np.maximum(count, 1), np.nan)

    everybody = mean_vote(world.known)
    own = np.stack([mean_vote(world.known & (world.told == group)) for group in range(len(GROUPS))])
    own = np.where(np.isnan(own), everybody, own)[world.told]
    values = {"one reward for all": np.broadcast_to(everybody, own.shape), "its group's mean": own}
    values["best possible"] = world.votes
    with np.errstate(invalid="ignore"):
        first = {name: (1 + np.sign(value[:, pairs[0]] - value[:, pairs[1]])) / 2 for name, value in values.items()}
    return {"random": np.full(first["best possible"].shape, 0.5), **first}


def compare(world: World, pairs: np.ndarray, policies: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean votes (U, 2) of each row of the table, for one seed. `policies` has the chances of each, the untrained
    first."""
    found = {name: votes_named(world, pairs, first) for name, first in references(world, pairs).items()}
    untrained, *trained = policies
    for likelier, end in ((False, ""), (True, ", likelier")):
        for name, chance in policies.items():
            found[name + end] = votes_named(world, pairs, share_of_first(chance, likelier)[world.told])
        for name in trained:
            found[f"{name}{end}, gain"] = found[name + end] - found[untrained + end]
        for name in trained[1:]:
            found[f"{name} - {trained[0]}{end}"] = found[name + end] - found[trained[0] + end]
    return found


def table(seeds: list[dict[str, np.ndarray]], group: np.ndarray, none: dict[str, float]) -> str:
    """Means over people, who count once in each seed; errors are over people, seeds together. Then what training
    changed in each seed, which tells how much another run would differ."""
    person = np.tile(np.arange(len(group)), len(seeds))
    columns = [f"{name}, {what}" for what in ("shown", "not shown") for name in GROUPS]
    lines = [f"mean vote, {len(seeds)} seed(s)".ljust(34) + "".join(f"{column:>22}" for column in columns)]
    for name in seeds[0]:
        values = np.concatenate([seed[name] for seed in seeds])
        cells = [mean_and_error(np.where(group[person] == one, values[:, part], np.nan), person)
                 for part in (0, 1) for one in range(len(GROUPS))]  # fmt: skip
        lines.append(name.ljust(34) + "".join("{:+.3f} ± {:.3f}".format(*cell).rjust(22) for cell in cells))
    if len(seeds) > 1:
        lines += ["", "by seed".ljust(34) + "".join(f"{column:>22}" for column in columns)]
        for name in (name for name in seeds[0] if name.endswith("likelier, gain") or " - " in name):
            cells = [" ".join(f"{np.nanmean(seed[name][group == one, part]):+.3f}" for seed in seeds)
                     for part in (0, 1) for one in range(len(GROUPS))]  # fmt: skip
            lines.append(name.ljust(34) + "".join(cell.rjust(22) for cell in cells))
    lines.append("answers that name none: " + ", ".join(f"{name} {share:.1%}" for name, share in none.items()))
    return "\n".join(lines)


def reproduce(args: argparse.Namespace, policy: Path) -> None:
    votes, texts = read(args.data)
    half = len(texts) // 2
    votes = votes[[preferred(own).size > 0 for own in votes[:, half:]]]  # the others say nothing of their group
    group = preference_groups(votes[:, half:])
    print(f"{len(votes)} people, {np.sum(group == 0)} in the majority; {half} statements in slates", flush=True)
    seeds, none = [], []
    for seed in range(args.seeds):  # the outer loop, so that contenders can be compared early
        world = draw_world(votes[:, :half], texts[:half], group, seed, args.groups == "random")
        pairs = judged_pairs(world, seed)
        folder = args.folder / f"untrained-seed-{seed}"
        folder.mkdir(exist_ok=True)
        policies = {"untrained": judge(folder, policy, world, pairs)}
        for estimator in args.estimators:
            folder = args.folder / f"{estimator.replace(':', ' ')}-seed-{seed}"
            policies[estimator] = run(folder, policy, world, estimator, seed, args.steps, args.scales)
        seeds.append(compare(world, pairs, policies))
        none.append({name: 1 - chance.sum(-1).mean() for name, chance in policies.items()})
        shares = {name: float(np.mean([one[name] for one in none])) for name in none[0]}
        print(table(seeds, group, shares), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=VOTES, help="A folder of Polis. Default: San Juan")
    parser.add_argument("--policy", type=Path, help="Default: SmolLM2-135M-Instruct, built from its pip package")
    parser.add_argument("--estimators", nargs="+", default=["group_norm", "pgrpo_eb"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help=f"Of {PROMPTS_PER_STEP * SAMPLES_PER_PROMPT} samples")
    parser.add_argument("--scales", action="store_true", help="Rewards of the minority are 5 vote - 10")
    parser.add_argument("--groups", choices=("found", "random"), default="found", help="Told to the policy")
    parser.add_argument("--quick", action="store_true", help="Two steps of one seed")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a training that runs also ends
    if args.quick:
        args.seeds, args.steps = 1, 2
    if min(args.seeds, args.steps) < 1:
        parser.error(f"--seeds and --steps need at least 1, got {args.seeds} and {args.steps}")
    if not is_polis(args.data):
        raise SystemExit(f"this needs votes of a Polis conversation, got none in {args.data}: name it with --data")
    args.folder = args.folder.resolve()
    policy = (build_policy() if args.policy is None else args.policy).resolve()
    settings = {"data": args.data.resolve(), "policy": policy, "steps": args.steps, "rate": LEARNING_RATE}
    one_set_of_flags(args.folder, **settings, scales=args.scales, groups=args.groups, defaults=asdict(PGRPOOptions()))
    try:
        reproduce(args, policy)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped: the same call goes on with what is in {args.folder}") from None


if __name__ == "__main__":
    main()
