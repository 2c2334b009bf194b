"""The language-model lab: which advantage estimator learns for everybody, on a real language model with real texts?

    python examples/language_model_lab.py FOLDER            # the stated grid: 700 runs, three hours of two cores
    python examples/language_model_lab.py FOLDER --quick    # two seeds of one cell: five minutes
    python examples/language_model_lab.py FOLDER --cells users-40 --estimators group_norm pgrpo --seeds 3 --noise 1
    python examples/language_model_lab.py FOLDER --cells groups-2-noise-0.3 --estimators pgrpo_eb pgrpo_eb+quantiles

It is the counterpart of `estimator_lab.py`, with its contenders. The policy is stories260K, a Llama that writes simple
stories. A prompt names somebody and begins a story for them; what they like is seen in the text itself:

    short      short sentences
    animals    words for animals
    dialogue   quotation marks
    happy      words of joy

A liking L is a number from 0 to 1 that the untrained model sometimes earns. The reward is

    R = offset + scale (L / s + difficulty b + noise e)        b, e ~ N(0, 1)

with s the standard deviation of L under the untrained model. In the cells named `groups`, four preference groups have
the shares .55 .25 .15 .05 and the scales and offsets of the bandit lab. In the cells `users-N`, each of N people is a
preference group with a scale (log-normal, sigma 1), an offset (standard deviation 5) and one of the four likings.

After a plus come weights of group-robust training, which multiply a contender's advantages: a `--robust.signal`, which
may have the options eta, chi and improvement_lambda (`pgrpo_eb+improvement:eta=0.5,improvement_lambda=0.2`). `bounds`
are those of L from 0 to 1. `importance` is no signal: all preference groups count the same from the start.

A step samples 32 answers of 48 tokens with transformers, gets advantages from the classes of `core/`, the host's
formulas or `estimator_relatives.py`, and makes one step of AdamW (the host's betas, gradients clipped to a norm of 1)
on the host's own policy loss. There is no KL term and no warm-up. Four times in a run, held-out beginnings are
continued for everybody, and their mean L is the score. A run is one process with one thread; it is kept in FOLDER, and
the same call goes on where one was interrupted.

Axes: B samples of a step, P prompts, N samples per prompt, G preference groups, L tokens.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch, advantage_estimators
from openrlhf_pgrpo.core.group_robust import GroupRobust
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.signals import SIGNALS, SignalOptions
from openrlhf_pgrpo.files import whole_file

sys.path.append(str(Path(__file__).resolve().parent))
from estimator_lab import HOST, Contender, Outcome, options_in, print_table, rival, with_random_labels
from kept_results import one_set_of_flags
from reproduce import shown

MODEL = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
FIGURE = Path(__file__).with_suffix(".png")
BATCH, TOKENS = 32, 48
EVALUATIONS = 4  # over a run, and one before
START, PADDING = 1, 2  # the model ends a story with its start token, and never wrote another end
ANSWERS_JUDGED = 128  # at each evaluation, over all preference groups
THRESHOLD = 0.6  # of the mean over likings, for "samples needed"
RATE, RATES, TUNING_SEEDS = 3e-4, (0.75e-4, 1.5e-4, 3e-4, 6e-4), range(1000, 1003)
CONTENDERS = [
    *("group_norm", "rloo", "dr_grpo", "reinforce_baseline"),
    *("pgrpo", "pgrpo_eb", "pref_group_norm", "ebpo", "jspo", "ebpo_per_group", "lite_ppo", "rae"),
    *(with_random_labels("pgrpo"), with_random_labels("pgrpo_eb")),
]
SHOWN = {"group_norm": "#000000", "reinforce_baseline": "#999999", "rloo": "#56B4E9", "pgrpo": "#0072B2",
         "pgrpo_eb": "#D55E00", "pref_group_norm": "#CC79A7", "ebpo_per_group": "#009E73"}  # fmt: skip

# ---- texts ----------------------------------------------------------------------------------------------------------

BEGINNINGS = [
    f"{when} there {was} {who}"
    for when, was, who in product(
        ("Once upon a time,", "One day,", "In a small house,", "Far away,"),
        ("was", "lived"),
        ("a little", "a big", "two", "a very nice"),
    )
]
HELD_OUT = BEGINNINGS[::4]  # never trained on
TRAINED = [text for text in BEGINNINGS if text not in HELD_OUT]
NAMES = "Tom Lily Ben Mia Sam Anna Max Sue Tim Lucy Jack Amy Bob Jane Leo Sara Dan Molly Joe Ella Bill".split()
ANIMALS = frozenset("cat dog bird bunny bear fish frog duck mouse horse cow pig lion rabbit puppy kitten".split())
JOY = frozenset("happy smiled fun laughed loved love liked glad play played".split())


def prompt(person: str, beginning: str) -> str:
    return f"{person} asked for a story. {beginning}"


def people(count: int) -> list[str]:
    """Names: of one each, or of two, if there are not enough."""
    pairs = (f"{one} and {other}" for one in NAMES for other in NAMES if one != other)
    return NAMES[:count] if count <= len(NAMES) else [name for name, _ in zip(pairs, range(count), strict=False)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def short(text: str) -> float:
    """1 for sentences of four words, 0 for those of fourteen or more."""
    sentences = [said for said in map(words, re.split(r"[.!?]", text)) if said]
    return float(np.clip((14 - np.mean([len(said) for said in sentences])) / 10, 0, 1)) if sentences else 0.0


def animals(text: str) -> float:
    return min(sum(word.removesuffix("s") in ANIMALS for word in words(text)), 3) / 3


def dialogue(text: str) -> float:
    return min(text.count('"'), 4) / 4


def happy(text: str) -> float:
    return min(sum(word in JOY for word in words(text)), 3) / 3


LIKINGS = (short, animals, dialogue, happy)

# ---- cells ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A world: `users` people, or four preference groups if it is 0."""

    name: str
    samples: int = 2
    noise: float = 0.3
    difficulty: float = 0.0
    users: int = 0
    alike: bool = False  # equal scales and offsets

    @property
    def groups(self) -> int:
        return self.users or len(LIKINGS)

    def changed(self, values: dict[str, float]) -> "Cell":
        """This cell with other values, which its name says."""
        name = "-".join([self.name, *(f"{option}-{value:g}" for option, value in values.items())])
        return replace(self, name=name, **values)

    def population(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Share, scale, offset and number of the liking, each (G,), of every preference group."""
        liking = np.arange(self.groups) % len(LIKINGS)
        if self.users:
            share = np.full(self.users, 1 / self.users)
            scale, offset = rng.lognormal(0, 1, self.users), rng.normal(0, 5, self.users)
        else:
            share, scale = np.array([0.55, 0.25, 0.15, 0.05]), np.array([1.0, 1.0, 5.0, 0.2])
            offset = np.array([0.0, 5.0, -10.0, 0.0])
        if self.alike:
            scale, offset = np.ones_like(scale), np.zeros_like(offset)
        return share, scale, offset, liking


CELLS = {
    cell.name: cell
    for cell in (
        *(Cell(f"groups-{n}-noise-{noise:g}", n, noise) for n in (2, 4) for noise in (0.3, 3.0)),
        Cell("groups-difficult", 2, 0.3, difficulty=2.0),
        Cell("groups-alike", 2, 0.3, alike=True),
        *(Cell(f"users-{users}", users=users) for users in (40, 100, 400)),
    )
}
TUNED = "groups-2-noise-0.3"  # here are all contenders, and each also at its own best learning rate
FEW = ["group_norm", "rloo", "reinforce_baseline", "pref_group_norm", "pgrpo", "pgrpo_eb", "ebpo_per_group"]

# ---- weights of preference groups -----------------------------------------------------------------------------------


def contender_and_weights(text: str) -> tuple[Contender, str]:
    """The contender, and what stands after the plus; empty if its samples have no weights.

    Raises:
        ValueError: an unknown name or option, or a bad value.
    """
    contender, plus, weights = text.partition("+")
    if plus:
        weigher(weights, {"anybody": (0.0, 1.0)})
    return Contender.parse(contender), weights


def weigher(text: str, bounds: dict[str, tuple[float, float]]) -> GroupRobust:
    """Fresh weights as they are written after a plus; `bounds` are those of each preference group's mean reward."""
    name, _, rest = text.partition(":")
    known = {"importance": [], "improvement": ["chi", "eta", "improvement_lambda"]}.get(name, ["chi", "eta"])
    refusal = f"weights of {name!r} need options from {known}, each once, got {text!r}"
    values = {option: float(value) for option, value in options_in(rest, known, refusal).items()}
    signal = {"improvement_lambda": values.pop("improvement_lambda")} if "improvement_lambda" in values else {}
    if name == "importance":
        values["chi"] = 0.0
    else:
        signal["signal"] = name
    if name == "bounds":
        signal["bounds"] = json.dumps(bounds)
    options = SignalOptions(**signal)
    return GroupRobust(RobustOptions(**values), SIGNALS[options.signal](options))


# ---- one run --------------------------------------------------------------------------------------------------------


class Writer:
    """The model and its tokenizer in this process, with the host's loss."""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from openrlhf_pgrpo.host.cpu.patches import patch_host

        torch.set_num_threads(1)
        os.environ["DS_ACCELERATOR"] = "cpu"
        if not torch.cuda.is_available():
            patch_host(None)  # what the host's modules need to be imported
        from openrlhf.models.loss import PolicyLoss

        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.loss = PolicyLoss()
        texts = self.write(self.load(), [prompt(NAMES[row % 4], TRAINED[row % len(TRAINED)]) for row in range(512)], 0)
        self.spread = np.std([[liking(text) for text in texts] for liking in LIKINGS], axis=1)  # untrained
        if never := [liking.__name__ for liking, spread in zip(LIKINGS, self.spread) if spread == 0]:
            raise ValueError(f"--model needs to earn each liking sometimes, got none of {never} in {len(texts)} texts")

    def sample(self, model, prompts: list[str]):
        """Prompts and answers as tokens (B, L), which of them are no padding, and where the answers begin."""
        import torch

        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(
                **batch, do_sample=True, top_k=0, max_new_tokens=TOKENS, eos_token_id=START, pad_token_id=PADDING
            )
        begin = batch["input_ids"].shape[1]
        ended = (tokens[:, begin:] == START).cumsum(1) - (tokens[:, begin:] == START).long()
        seen = torch.cat([batch["attention_mask"], (ended == 0).long()], 1)
        return tokens, seen, begin

    def texts(self, tokens, begin: int) -> list[str]:
        return self.tokenizer.batch_decode(tokens[:, begin:], skip_special_tokens=True)

    def write(self, model, prompts: list[str], seed: int) -> list[str]:
        """An answer to each prompt; what else is drawn is not changed by it."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokens, _, begin = self.sample(model, prompts)
        return self.texts(tokens, begin)

    def log_probs(self, model, tokens, seen, begin: int):
        """(B, T) of the answers' tokens."""
        import torch

        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=tokens, attention_mask=seen, position_ids=positions).logits[:, begin - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, tokens[:, begin:, None])[..., 0]


@cache
def writer(folder: Path) -> Writer:
    return Writer(folder)


def train(folder: Path, cell: Cell, text: str, seed: int, rate: float, steps: int) -> list[dict]:
    """One run, at each evaluation: the step, the mean of everybody's own L for each liking, and the largest alpha of
    weights."""
    import torch

    stories, (contender, weights) = writer(folder), contender_and_weights(text)
    rng, swaps = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    share, scale, offset, liking = cell.population(rng)
    names, prompts = people(cell.groups), BATCH // cell.samples
    torch.manual_seed(seed)
    model = stories.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    advantages, found = contender.start(1, cell.groups), []
    highest = offset + scale / stories.spread[liking]
    robust = weigher(weights, dict(zip(names, zip(offset, highest)))) if weights else None
    for step in range(steps + 1):
        if step % (steps // EVALUATIONS) == 0:
            found.append({"step": step, "scores": evaluate(stories, model, names, liking, seed)})
            if robust is not None:
                found[-1]["largest_alpha"] = robust.weights.alpha.max(initial=1 / cell.groups)
        if step == steps:
            return found
        group = rng.choice(cell.groups, prompts, p=share)
        beginnings = rng.choice(TRAINED, prompts)
        label = swaps.permutation(group) if contender.random_labels else group
        difficulty, noise = rng.standard_normal((prompts, 1)), rng.standard_normal((prompts, cell.samples))
        asked = [prompt(names[g], beginning) for g, beginning in zip(group, beginnings) for _ in range(cell.samples)]
        tokens, seen, begin = stories.sample(model, asked)
        texts = np.array(stories.texts(tokens, begin), object).reshape(prompts, cell.samples)
        liked = np.array([[LIKINGS[liking[g]](answer) for answer in row] for g, row in zip(group, texts)])
        value = liked / stories.spread[liking[group]][:, None] + cell.difficulty * difficulty + cell.noise * noise
        rewards = offset[group][:, None] + scale[group][:, None] * value
        a = advantages(rewards[None], label[None]).ravel()
        if robust is not None:
            owners = [names[g] for g in label for _ in range(cell.samples)]
            nothing = [None] * BATCH
            batch = RewardBatch(rewards.ravel(), np.arange(BATCH) // cell.samples, owners, nothing, nothing)
            a = a * robust(batch, seen[:, begin:].sum(1).numpy())
        a = torch.from_numpy(a.reshape(-1, 1)).float()
        log_probs = stories.log_probs(model, tokens, seen, begin)
        loss, *_ = stories.loss(log_probs, log_probs.detach(), a.expand_as(log_probs), seen[:, begin:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise AssertionError("the last step returns")


def evaluate(stories: Writer, model, names: list[str], liking: np.ndarray, seed: int) -> list[float]:
    """The mean of people's own L over held-out beginnings, for each liking."""
    rng = np.random.default_rng(seed)
    each = max(1, ANSWERS_JUDGED // len(names))
    whom = [g for g in range(len(names)) for _ in range(each)]
    if len(whom) > ANSWERS_JUDGED:  # of many people, as many of each liking
        whom = [*rng.permutation(len(names))[:ANSWERS_JUDGED]]
    asked = [prompt(names[g], HELD_OUT[row % len(HELD_OUT)]) for row, g in enumerate(whom)]
    scores = [LIKINGS[liking[g]](text) for g, text in zip(whom, stories.write(model, asked, seed))]
    owner = liking[whom]
    return (np.bincount(owner, scores) / np.bincount(owner)).tolist()


# ---- many runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    cell: Cell
    text: str
    seed: int
    rate: float
    steps: int

    def folder(self, folder: Path) -> Path:
        return folder / self.cell.name / self.text.replace(":", " ")

    def path(self, folder: Path) -> Path:
        return self.folder(folder) / f"rate-{self.rate:g}-steps-{self.steps}-seed-{self.seed}.json"

    def settings(self) -> dict:
        """What a run follows from, besides what its path says; defaults may be others one day."""
        contender, weights = contender_and_weights(self.text)
        found = {"cell": asdict(self.cell), "batch": BATCH, "tokens": TOKENS}
        if contender.name in advantage_estimators():
            found["options"] = asdict(contender.options)
        if weights:
            robust = weigher(weights, {"everybody": (0.0, 1.0)})
            found |= {"weights": asdict(robust.weights.options), "signal": asdict(robust.signal.options)}
        return found


def jobs_of(cell: Cell, text: str, rate: float, steps: int, seeds: Iterable[int]) -> list[Job]:
    return [Job(cell, text, seed, rate, steps) for seed in seeds]


def work(folder: Path, model: Path, job: Job) -> None:
    found = train(model, job.cell, job.text, job.seed, job.rate, job.steps)
    with whole_file(job.path(folder)) as file:
        file.write(json.dumps(found).encode())


def run(folder: Path, model: Path, jobs: list[Job]) -> None:
    """Makes the runs that are not there yet, as many at a time as there are cores.

    Raises:
        SystemExit: those that are there are of another model, or of other defaults.
    """
    for job in {job.folder(folder): job for job in jobs}.values():
        one_set_of_flags(job.folder(folder), model=model.resolve(), **job.settings())
    left = [job for job in dict.fromkeys(jobs) if not job.path(folder).exists()]
    if not left:
        return
    print(f"{len(left)} of {len(jobs)} runs are to be made", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number_done, _ in enumerate(pool.map(work, *zip(*((folder, model, job) for job in left))), 1):
            if number_done % 10 == 0:
                print(f"{number_done} made", flush=True)


def read(folder: Path, job: Job) -> list[dict]:
    return json.loads(job.path(folder).read_text())


def curve(folder: Path, job: Job) -> np.ndarray:
    """(evaluations, likings)"""
    return np.array([row["scores"] for row in read(folder, job)])


def at_the_end(values: np.ndarray) -> np.ndarray:
    """The mean of the last two evaluations, of (S, evaluations, ...)."""
    return values[:, -2:].mean(1)


def curves(folder: Path, jobs: list[Job]) -> np.ndarray:
    """(S, evaluations, likings)"""
    return np.stack([curve(folder, job) for job in jobs])


def evaluations_needed(scores: np.ndarray) -> float:
    """Until the mean of scores (S, evaluations, likings) is THRESHOLD, on a line between two; inf if it never is."""
    average = scores.mean((0, 2))
    reached = np.flatnonzero(average >= THRESHOLD)
    if not len(reached) or reached[0] == 0:
        return np.inf
    before, after = average[reached[0] - 1 : reached[0] + 1]
    return reached[0] - 1 + (THRESHOLD - before) / (after - before)


def ratio(own: np.ndarray, other: np.ndarray) -> str:
    """Samples needed over those of another, with the jackknife's error over seeds, which both share."""
    seeds = np.arange(len(own))
    parts = [seeds, *(np.delete(seeds, seed) for seed in seeds)]
    needed = np.array([[evaluations_needed(scores[part]) for part in parts] for scores in (own, other)])
    if not np.isfinite(needed).all():
        return "never" if np.isinf(needed[0]).any() else "alone"
    together, *but_one = needed[0] / needed[1]
    return shown.with_error(together, np.sqrt((len(seeds) - 1) * np.var(but_one)), 2)


def print_likings(folder: Path, contenders: dict[str, list[Job]], outcomes: dict[str, Outcome]) -> None:
    """The score of each liking before training and at the end; by how much mean and worst are above the rival's, with
    paired errors; the samples needed; and the largest alpha, where samples have weights."""
    width = max(map(len, ("untrained", *contenders)))
    heads = [*(liking.__name__ for liking in LIKINGS), "mean less", "worst less", "samples", "largest alpha"]
    print("\n" + " " * width + "".join(f"  {head:<10}" for head in heads))
    scores = {text: curves(folder, jobs) for text, jobs in contenders.items()}
    before = next(iter(scores.values()))[:, 0].T  # the same for all: it is the seed's
    print("untrained".ljust(width) + "".join(f"  {shown.number(value):<10}" for value in before))
    fastest = min((text for text in scores if text in HOST), key=lambda text: outcomes[text].samples, default=None)
    for text, jobs in contenders.items():
        own, other = outcomes[text], rival(text, outcomes)
        slower = fastest or next(name for name in scores if outcomes[name] is other)
        values = [*at_the_end(scores[text]).T, own.mean - other.mean, own.worst - other.worst]
        cells = [*map(shown.number, values), ratio(scores[text], scores[slower])]
        if "+" in text:
            alpha = np.array([read(folder, job)[-1]["largest_alpha"] for job in jobs])
            cells.append(shown.number(alpha))
        print(text.ljust(width) + "".join(f"  {cell:<10}" for cell in cells))


def outcome(folder: Path, jobs: list[Job]) -> Outcome:
    """Mean and worst score at the end; samples until the mean is THRESHOLD."""
    scores = curves(folder, jobs)
    end, samples = at_the_end(scores), evaluations_needed(scores) * (jobs[0].steps // EVALUATIONS) * BATCH
    return Outcome(jobs[0].rate, end.mean(1), end.min(1), samples)


def tune(folder: Path, model: Path, contenders: list[str], seeds, steps: int) -> None:
    """In the cell TUNED, each contender at the rate that was best for it on other seeds."""
    cell = CELLS[TUNED]
    tried = {text: {rate: jobs_of(cell, text, rate, steps, TUNING_SEEDS) for rate in RATES} for text in contenders}
    run(folder, model, [job for rates in tried.values() for made in rates.values() for job in made])
    best = {text: max(RATES, key=lambda rate: outcome(folder, made[rate]).mean.mean()) for text, made in tried.items()}
    made = {text: jobs_of(cell, text, rate, steps, seeds) for text, rate in best.items()}
    run(folder, model, [job for own in made.values() for job in own])
    outcomes = {text: outcome(folder, own) for text, own in made.items()}
    print_table(f"{TUNED}, each at its own best learning rate", {"chosen on other seeds": outcomes}, False)
    print_likings(folder, made, outcomes)
    print("rates: " + ", ".join(f"{text} {rate:g}" for text, rate in best.items()))


def draw(scores: dict[str, dict[str, np.ndarray]], steps: int, path: Path) -> None:
    """Mean and worst liking over samples, a column for each cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, len(scores), figsize=(3 * len(scores), 6), sharex=True, sharey="row", squeeze=False)
    for column, (cell, found) in zip(axes.T, scores.items()):
        for text, colour in SHOWN.items():
            if text not in found:
                continue
            for ax, values in zip(column, (found[text].mean(2), found[text].min(2))):
                samples = np.linspace(0, steps * BATCH, values.shape[1])
                ax.errorbar(samples, values.mean(0), shown.error(values), color=colour, label=text, linewidth=1.2)
        column[0].set_title(cell, fontsize=10)
        column[1].set_xlabel("samples")
    axes[0, 0].set_ylabel("mean over likings")
    axes[1, 0].set_ylabel("worst liking")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    with whole_file(path) as file:
        fig.savefig(file, format=path.suffix[1:], dpi=100)
    plt.close(fig)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,  # defaults follow from what stands in argv
    )
    parser.add_argument("folder", type=Path, help="where runs are kept")
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder with stories260K")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=[*CELLS])
    parser.add_argument("--samples", type=int, choices=(2, 4, 8, 16), help="per prompt, instead of a cell's own")
    parser.add_argument("--noise", type=float, help="of rewards, in spreads of a liking, instead of a cell's own")
    parser.add_argument(
        "--difficulty", type=float, help="spread of prompts, in the same unit, instead of a cell's own"
    )
    parser.add_argument("--estimators", nargs="+", help="as in estimator_lab.py; after a plus, weights")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first_seed", type=int, default=0, help="others than those that a default was chosen on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=RATE, help=f"the common learning rate. Default: {RATE:g}")
    parser.add_argument("--tune", action="store_true", help=f"in {TUNED}, also each at its own best learning rate")
    parser.add_argument("--quick", action="store_true", help=f"two seeds of {TUNED}")
    parser.add_argument("--out", type=Path, help="the figure")
    if "--quick" in argv:
        parser.set_defaults(cells=[TUNED], seeds=2, estimators=["group_norm", "pgrpo", "pgrpo_eb"])
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds needs at least 2 for a standard error, got {args.seeds}")
    if args.first_seed < 0:
        parser.error(f"--first_seed needs a number of at least 0, got {args.first_seed}")
    if not 0 < args.rate < np.inf:
        parser.error(f"--rate needs a positive number, got {args.rate:g}")
    shown.check_figure(parser, args.out)
    if args.steps < EVALUATIONS or args.steps % EVALUATIONS:
        parser.error(f"--steps needs a multiple of {EVALUATIONS}, the number of evaluations, got {args.steps}")
    for name in ("noise", "difficulty"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < np.inf:
            parser.error(f"--{name} needs a finite number of at least 0, got {value:g}")
    if args.tune and any(value is not None for value in (args.samples, args.noise, args.difficulty)):
        parser.error(f"--tune needs the cell {TUNED} as it is: leave --samples, --noise and --difficulty out")
    if not (args.model / "config.json").is_file():
        parser.error(f"--model needs a folder with stories260K, got none at {args.model}")
    changed = {name: getattr(args, name) for name in ("samples", "noise", "difficulty")}
    cells = [CELLS[name].changed({option: value for option, value in changed.items() if value is not None})
             for name in args.cells]  # fmt: skip
    names = {cell: args.estimators or (CONTENDERS if cell.name == TUNED else FEW) for cell in cells}
    try:
        for text in {text for texts in names.values() for text in texts}:
            contender_and_weights(text)
    except ValueError as problem:
        parser.error(str(problem))

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    grid = product(seeds, ((cell, text) for cell in cells for text in names[cell]))
    run(args.folder, args.model, [Job(cell, text, seed, args.rate, args.steps) for seed, (cell, text) in grid])
    print(f"seeds {seeds[0]} to {seeds[-1]}, {args.steps} steps of {BATCH} samples, learning rate {args.rate:g}\n"
          "mean, worst: score of held-out prompts at the end, mean over likings and worst of them, ± standard error\n"
          "less: mean and worst, less those of the host's best by mean, or where none runs of the contender without "
          "what is added to it\n"
          f"samples: to a mean of {THRESHOLD}, over those of the fastest of the host's, or of that contender"
          )  # fmt: skip
    made = {cell: {text: jobs_of(cell, text, args.rate, args.steps, seeds) for text in names[cell]} for cell in cells}
    for cell, contenders in made.items():
        outcomes = {text: outcome(args.folder, own) for text, own in contenders.items()}
        print_table(cell.name, {f"{cell.samples} samples per prompt": outcomes}, False)
        print_likings(args.folder, contenders, outcomes)
    if args.tune:
        tune(args.folder, args.model, args.estimators or CONTENDERS, seeds, args.steps)
    if args.out:
        draw({cell.name: {text: curves(args.folder, own) for text, own in contenders.items()}
              for cell, contenders in made.items()}, args.steps, args.out)  # fmt: skip
        print(f"\nfigure: {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
