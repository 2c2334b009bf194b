"""The estimator lab: which advantage estimator learns for everybody, and when? An answer in a minute, without a model.

    python examples/estimator_lab.py                # the stated grid: every cell x every estimator, and the figure
    python examples/estimator_lab.py --options      # what the options of P-GRPO do, with and without drift
    python examples/estimator_lab.py --relatives    # ours beside what others have published
    python examples/estimator_lab.py --difficulty 0 1 2 --samples 4 --estimators group_norm pgrpo pgrpo:half_life=512

A contextual bandit with preference groups. A prompt belongs to a preference group p and has a difficulty b; an answer
is one of A actions, and its reward is

    R = offset_p + scale_p (taste_p[action] + difficulty b + noise e + drift t/T)        b, e ~ N(0, 1)

where taste_p ~ N(0, 1) is partly common to all preference groups; difficulty, noise and drift count in standard
deviations of what the choice of an action is worth. The policy is a softmax whose logits are linear in features of the
preference group. These are rotated at random, so that preference groups share every parameter, as in a network: Adam,
which rescales each parameter, would otherwise rescale each preference group and do the estimator's work.

Advantages come from the classes of `openrlhf_pgrpo.core`, from the host's formulas and, of relatives, from
`estimator_relatives.py`; then comes the host's clip, and one step of Adam per batch. Every estimator sees the same
prompts and dice, so differences are paired by seed. Adam takes out the overall size of advantages but not their noise.
So there are two learning rates: a small one for all, as in real runs, where stability sets it; and for each estimator
and cell its own best of `--rates`, chosen on other seeds.

The lab reports the normalised reward: the expected taste of a preference group under the policy, exact and not
sampled, 0 for the uniform start and 1 for the best action, averaged over the run (the area under the learning curve).

Axes: S seeds, T steps, P prompts per step, N samples per prompt, G preference groups, A actions, K = G + 1 features.
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from estimator_relatives import RELATIVES, whitened
from openrlhf_pgrpo.core.estimator import RewardBatch, advantage_estimators, make_advantage_estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions
from openrlhf_pgrpo.files import whole_file
from reproduce import shown

CLIP = (-10.0, 10.0)  # the default of the host's --reward.clip_range
BETAS, ADAM_EPS = (0.9, 0.95), 1e-8  # the host's default --actor.adam.betas
TUNING_SEEDS = range(1000, 1020)
THRESHOLD = 0.5  # of the mean over preference groups, for "samples needed"
CLEAR = 3  # paired standard errors that make a difference worth a sign
FIGURE = Path(__file__).with_suffix(".png")

# The stated grid: a cell for each combination of these, and in each of them every estimator.
GRID = {"difficulty": [0.0, 2.0], "noise": [0.3, 3.0], "drift": [0.0], "samples": [2, 4, 8]}
STOCK = ["group_norm", "dr_grpo", "rloo", "reinforce_baseline", "reinforce", "flash_reinforce"]
CENTRED = "pgrpo:center=prompt"
OURS = ["pgrpo", "pgrpo_eb", CENTRED, "pref_group_norm"]
VARIANTS = "update=after half_life=128 half_life=512 half_life=2048 min_count=2 min_count=16 min_count=64 eps=0.01"
COMPARED = [*STOCK, *OURS[:2], *RELATIVES]
OPTIONS_GRID = {"difficulty": [1.0], "drift": [0.0, 6.0], "samples": [2, 8]}
OPTIONS = [f"{name}{variant}" for name in OURS[:2] for variant in ["", *(f":{text}" for text in VARIANTS.split())]]
STYLES = {  # what the figure shows, in the colours of Okabe and Ito, which the colour-blind can tell apart
    "group_norm": ("#000000", "s-"),
    "reinforce_baseline": ("#999999", "D-"),
    "pgrpo": ("#0072B2", "o-"),
    "pgrpo_eb": ("#D55E00", "^-"),
    CENTRED: ("#009E73", "v-"),
    "pgrpo:labels=random": ("#56B4E9", "o:"),
}
LABELS = {CENTRED: "pgrpo, centred on prompts", "pgrpo:labels=random": "pgrpo, random labels"}


def with_random_labels(text: str) -> str:
    """The same contender, to which prompts seem to swap preference groups at random."""
    return f"{text}{',' if ':' in text else ':'}labels=random"


@dataclass(frozen=True)
class Scenario:
    """One cell of the grid.

    Raises:
        ValueError: a value outside its range, or another number of shares than of scales or offsets.
    """

    difficulty: float = 0.0
    noise: float = 0.3
    drift: float = 0.0
    samples: int = 4
    shares: tuple = (0.55, 0.25, 0.15, 0.05)
    scales: tuple = (1.0, 1.0, 5.0, 0.2)
    offsets: tuple = (0.0, 5.0, -10.0, 0.0)
    agreement: float = 0.5  # correlation of two preference groups' tastes
    actions: int = 64
    prompts: int = 32
    steps: int = 200

    def __post_init__(self):
        sizes = {name: len(getattr(self, name)) for name in ("shares", "scales", "offsets")}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"--shares, --scales and --offsets need one number per preference group, got {sizes}")
        needs = [
            ("positive numbers", ("shares", "scales"), lambda x: 0 < x < np.inf),
            ("finite numbers", ("offsets", "drift"), np.isfinite),
            ("a finite number >= 0", ("difficulty", "noise"), lambda x: 0 <= x < np.inf),
            ("at least 1", ("samples", "prompts", "steps"), lambda x: x >= 1),
            ("at least 2", ("actions",), lambda x: x >= 2),
            ("a number from 0 to 1", ("agreement",), lambda x: 0 <= x <= 1),
        ]
        for need, names, holds in needs:
            for name in names:
                if not all(map(holds, np.atleast_1d(getattr(self, name)))):
                    raise ValueError(f"--{name} needs {need}, got {getattr(self, name)}")


class World:
    """All that chance decides before the policy acts, for each seed from its own stream.

    Attributes: taste (S, G, A), features (S, G, K); pref_group and shuffled, the same among other prompts, (T, S, P);
    difficulty (T, S, P, 1); dice and noise (T, S, P, N).
    """

    def __init__(self, scenario: Scenario, seeds):
        self.scenario = scenario
        draws = zip(*(self._draw(scenario, np.random.default_rng(seed)) for seed in seeds))
        self.taste, self.features, *streams = map(np.stack, draws)
        self.pref_group, self.shuffled, self.difficulty, self.dice, self.noise = (x.swapaxes(0, 1) for x in streams)

    @staticmethod
    def _draw(s: Scenario, rng):
        groups, batch = len(s.shares), (s.steps, s.prompts)
        common, own = rng.standard_normal(s.actions), rng.standard_normal((groups, s.actions))
        rotation = np.linalg.qr(rng.standard_normal((groups + 1, groups + 1))).Q
        pref_group = rng.choice(groups, batch, p=np.array(s.shares) / sum(s.shares))
        yield np.sqrt(s.agreement) * common + np.sqrt(1 - s.agreement) * own
        yield np.column_stack([np.ones(groups), np.eye(groups)]) @ rotation
        yield pref_group
        yield rng.permuted(pref_group, axis=1)
        yield s.difficulty * rng.standard_normal((*batch, 1))
        yield rng.random((*batch, s.samples))
        yield s.noise * rng.standard_normal((*batch, s.samples))


def centred(x, axes=-1):
    return x - x.mean(axes, keepdims=True)


# The host's estimators on rewards (S, P, N), and whether each whitens over the batch after its clip (OpenRLHF 0.11.2,
# trainer/ppo_utils/experience_maker.py).
HOST = {
    "group_norm": (lambda x: centred(x) / (x.std(-1, ddof=1, keepdims=True) + 1e-9), False),
    "dr_grpo": (centred, False),
    "rloo": (lambda x: x - (x.sum(-1, keepdims=True) - x) / (x.shape[-1] - 1), False),
    "reinforce_baseline": (centred, True),
    "reinforce": (lambda x: x, True),
    "flash_reinforce": (lambda x: centred(x, (1, 2)), False),
}


def options_in(text: str, known: Collection[str], refusal: str) -> dict[str, str]:
    """Options written `half_life=256,update=after`. Raises ValueError: one is not known, or stands there twice."""
    pairs = [pair.partition("=")[::2] for pair in text.split(",") if pair]
    found = dict(pairs)
    if not found.keys() <= set(known) or len(found) < len(pairs):
        raise ValueError(refusal)
    return found


class Contender(NamedTuple):
    """An estimator with its options, written `pgrpo_eb:half_life=256,update=after`, and the labels it gets to see."""

    name: str
    options: PGRPOOptions
    random_labels: bool

    @classmethod
    def parse(cls, text: str) -> "Contender":
        """Raises ValueError: an unknown estimator or option, a bad value, or an option for one of the host's."""
        name, _, rest = text.partition(":")
        if name not in HOST and name not in RELATIVES and name not in advantage_estimators():
            known = [*HOST, *RELATIVES, *advantage_estimators()]
            raise ValueError(f"--estimators needs names from {known}, got {name!r}")
        ours = name in advantage_estimators()
        types = {spec.name: str if spec.type is str else float for spec in fields(PGRPOOptions)} if ours else {}
        if name not in HOST:
            types["labels"] = str
        texts = options_in(rest, types, f"{name} needs options from {list(types)}, each once, got {text!r}")
        values = {option: types[option](value) for option, value in texts.items()}
        labels = values.pop("labels", "true")
        if labels not in ("true", "random"):
            raise ValueError(f"{name} needs labels=true or labels=random, got {text!r}")
        return cls(name, PGRPOOptions(**values), labels == "random")

    @property
    def min_samples(self) -> int:
        if self.name in HOST:
            return 1 if self.name in ("reinforce", "flash_reinforce") else 2
        if self.name in RELATIVES:
            return 2
        return make_advantage_estimator(self.name, self.options).min_samples_per_prompt

    def start(self, seeds: int, groups: int) -> Callable:
        """A function from rewards (S, P, N) and labels (S, P) to advantages (S, P, N), with an empty history.

        One instance of a core class serves all seeds: it sees every preference group of every seed as a separate one,
        and histories of different preference groups never meet. `pgrpo_global` has one history for
        everybody, so here it is `pgrpo` with the seed as the preference group.
        """
        if self.name in HOST:
            shape, whitens = HOST[self.name]
            finish = whitened if whitens else np.asarray
            return lambda rewards, label: finish(shape(rewards).clip(*CLIP))
        if self.name in RELATIVES:
            relative = RELATIVES[self.name](seeds, groups)
            return lambda rewards, label: relative(rewards, label).clip(*CLIP)
        apart = advantage_estimators()[self.name].uses_pref_groups
        estimator = make_advantage_estimator(self.name if apart else "pgrpo", self.options)
        names = np.array([f"seed {s}, {g}" for s in range(seeds) for g in range(groups)], object)
        first = groups * np.arange(seeds)[:, None]

        def advantages(rewards, label):
            prompt_groups = np.arange(rewards.size) // rewards.shape[-1]
            owners = names[(first + apart * label).ravel()[prompt_groups]].tolist()
            nothing = [None] * rewards.size
            batch = RewardBatch(rewards.ravel(), prompt_groups, owners, nothing, nothing)
            return estimator(batch).reshape(rewards.shape).clip(*CLIP)

        return advantages


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def learn(world: World, contender: Contender, rates) -> np.ndarray:
    """Normalised expected reward (S, T, G) of the policy after each step; `rates` (S,) are Adam's learning rates."""
    s, (steps, seeds, prompts) = world.scenario, world.pref_group.shape
    groups, actions = world.taste.shape[1:]
    label = world.shuffled if contender.random_labels else world.pref_group
    advantages = contender.start(seeds, groups)
    scale, offset, rates = np.array(s.scales), np.array(s.offsets), np.reshape(rates, (-1, 1, 1))
    start = world.taste.mean(-1)
    span = world.taste.max(-1) - start
    rows = np.arange(seeds * groups).reshape(seeds, groups, 1)  # one row for each preference group of each seed
    weights, mean, square = np.zeros((3, seeds, groups + 1, actions))
    policy = softmax(world.features @ weights)
    curve = np.empty((seeds, steps, groups))
    for t in range(steps):
        group = world.pref_group[t, :, :, None]
        row = rows[:, :1] + group
        # One search for all rows: the cumulative probabilities of row i lie in (i, i + 1].
        chosen = np.searchsorted((policy.cumsum(-1) + rows).ravel(), row + world.dice[t], side="right")
        chosen = chosen.clip(row * actions, row * actions + actions - 1)  # rounding may leave the row
        value = world.taste.ravel()[chosen] + world.difficulty[t] + world.noise[t] + s.drift * t / steps
        a = advantages(offset[group] + scale[group] * value, label[t])

        up = np.bincount(chosen.ravel(), a.ravel(), policy.size).reshape(policy.shape)
        gradient = world.features.swapaxes(1, 2) @ (up - policy * up.sum(-1, keepdims=True)) / (prompts * s.samples)
        mean += (1 - BETAS[0]) * (gradient - mean)
        square += (1 - BETAS[1]) * (np.square(gradient) - square)
        size = np.sqrt(square / (1 - BETAS[1] ** (t + 1))) + ADAM_EPS
        weights += rates * mean / (1 - BETAS[0] ** (t + 1)) / size
        policy = softmax(world.features @ weights)
        curve[:, t] = ((policy * world.taste).sum(-1) - start) / span
    return curve


class Outcome(NamedTuple):
    """Areas under the curve (S,), mean over preference groups and worst of them; samples to THRESHOLD, all seeds."""

    rate: float
    mean: np.ndarray
    worst: np.ndarray
    samples: float

    @classmethod
    def of(cls, world: World, contender: Contender, rate: float) -> "Outcome":
        curve = learn(world, contender, np.full(len(world.taste), rate))
        area, average = curve.mean(1), np.append(0.0, curve.mean((0, 2)))
        step = np.argmax(average >= THRESHOLD)  # 0: never
        part = (THRESHOLD - average[step - 1]) / (average[step] - average[step - 1])
        samples = (step - 1 + part) * world.scenario.prompts * world.scenario.samples if step else np.inf
        return cls(rate, area.mean(1), area.min(1), samples)

    @classmethod
    def average(cls, outcomes: list["Outcome"]) -> "Outcome":
        """The average over cells, seed by seed; of samples, the geometric mean."""
        rates, means, worsts, samples = map(np.array, zip(*outcomes))
        return cls(rates.mean(), means.mean(0), worsts.mean(0), np.exp(np.log(samples).mean()))


def run_cell(scenario: Scenario, contenders: list[Contender], seeds: int, rate: float, rates: list[float]) -> list:
    """For each contender its outcome at the common rate, and at the one of `rates` that was best on tuning seeds."""
    world, tuning = World(scenario, range(seeds)), World(scenario, [*TUNING_SEEDS] * len(rates))
    pairs = []
    for contender in contenders:
        areas = learn(tuning, contender, np.repeat(rates, len(TUNING_SEEDS))).mean((1, 2)).reshape(len(rates), -1)
        best = rates[areas.mean(1).argmax()]
        pairs.append((Outcome.of(world, contender, rate), Outcome.of(world, contender, best)))
    return pairs


def run(scenarios: list[Scenario], contenders: dict[str, Contender], *settings) -> tuple[dict, dict]:
    """Two dictionaries scenario -> text of the contender -> Outcome, at the common rate and at each its best."""
    longest_first = sorted(scenarios, key=lambda scenario: -scenario.samples)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run_cell, scenario, [*contenders.values()], *settings) for scenario in longest_first]
        pairs = {scenario: job.result() for scenario, job in zip(longest_first, jobs)}
    return tuple({s: dict(zip(contenders, (pair[i] for pair in pairs[s]))) for s in scenarios} for i in (0, 1))


def rival(text: str, outcomes: dict[str, Outcome]) -> Outcome:
    """What a contender is compared with: the best of the host's; where none runs, itself without anything added."""
    if stock := [outcomes[name] for name in outcomes if name in HOST]:
        return max(stock, key=lambda o: o.mean.mean())
    plain = (text.rpartition("+")[0], re.split("[:+]", text)[0], text)
    return outcomes[next(name for name in plain if name in outcomes)]


def number(values: np.ndarray, other: np.ndarray) -> str:
    """Mean, standard error, and the sign of a clear paired difference to `other`: `.873±.009+`."""
    difference, margin = (values - other).mean(), CLEAR * shown.error(values - other)
    sign = "+" if difference > margin else "-" if difference < -margin else " "
    return shown.number(values) + sign


def ratio(text: str, outcomes: dict[str, Outcome]) -> str:
    """Samples needed over those of the fastest of the host's; where none runs, of itself without options."""
    stock = [outcomes[name].samples for name in outcomes if name in HOST]
    own, best = outcomes[text].samples, min(stock, default=rival(text, outcomes).samples)
    return "never" if own == np.inf else "alone" if best == np.inf else f"{own / best:.2f}"


def print_table(title: str, columns: dict[str, dict[str, Outcome]], with_ratio: bool = True) -> None:
    """A row per contender; `columns` are heading -> text of the contender -> Outcome."""
    blocks = [["", "", *next(iter(columns.values()))]]
    for heading, outcomes in columns.items():
        block = [heading, f"{'mean':<11}{'worst':<11}" + "ratio" * with_ratio]
        for text, own in outcomes.items():
            other = rival(text, outcomes)
            line = f"{number(own.mean, other.mean):<11}{number(own.worst, other.worst):<11}"
            block.append(line + f"{ratio(text, outcomes):>5}" * with_ratio)
        blocks.append(block)
    widths = [max(map(len, block)) for block in blocks]
    print(f"\n{title}")
    for cells in zip(*blocks):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


def report(common: dict, best: dict) -> None:
    """A table per cell at the common learning rate; then averages over cells, at that rate and at each its own."""
    for title, cells in by(common, "difficulty", "noise", "drift").items():
        print_table(title, {f"{s.samples} samples per prompt": outcomes for s, outcomes in cells.items()})
    for title, results in {"the common": common, "each its own best": best}.items():
        columns = {
            heading: {text: Outcome.average([cell[text] for cell in cells.values()]) for text in [*cells.values()][0]}
            for heading, cells in by(results, "difficulty", "drift").items()
        }
        print_table(f"average over the other axes, at {title} learning rate", columns, results is common)
    rates = Counter(o.rate for outcomes in best.values() for o in outcomes.values())
    print("times that a learning rate was best: " + ", ".join(f"{rate}: {rates[rate]}" for rate in sorted(rates)))


def by(results: dict, *names: str) -> dict[str, dict]:
    """The same results in a dictionary for each combination of the fields `names`. A drift of 0 is not named."""
    parts = {}
    for scenario, outcomes in results.items():
        values = {name: getattr(scenario, name) for name in names}
        heading = ", ".join(f"{name} {value:g}" for name, value in values.items() if value or name != "drift")
        parts.setdefault(heading, {})[scenario] = outcomes
    return parts


def draw(results: dict, path: Path) -> None:
    """Mean and worst preference group over samples per prompt, a column for each cell of the other axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by(results, "difficulty", "noise", "drift")
    fig, axes = plt.subplots(2, len(cells), figsize=(9, 6), sharex=True, sharey="row", squeeze=False)
    for column, (heading, outcomes) in zip(axes.T, cells.items()):
        ticks = [scenario.samples for scenario in outcomes]
        for ax, reward in zip(column, ("mean", "worst")):
            for text, (colour, style) in STYLES.items():
                areas = [getattr(cell[text], reward) for cell in outcomes.values() if text in cell]
                if areas:
                    means, errors = [area.mean() for area in areas], [shown.error(area) for area in areas]
                    label = LABELS.get(text, text)
                    ax.errorbar(ticks, means, errors, fmt=style, color=colour, markersize=4, label=label)
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, map(str, ticks))
            ax.grid(alpha=0.3)
        column[0].set_title(heading, fontsize=10)
        column[1].set_xlabel("samples per prompt")
    axes[0, 0].set_ylabel("mean over preference groups")
    axes[1, 0].set_ylabel("worst preference group")
    fig.suptitle("Normalised reward over the run (1: the best action from the start) ± standard error", fontsize=11)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    fig.tight_layout(rect=(0, 0.09, 1, 1))
    with whole_file(path) as file:
        fig.savefig(file, format=path.suffix[1:], dpi=100)
    plt.close(fig)


def parse(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # defaults follow from what stands in argv
    )
    for spec in fields(Scenario):
        cells, many = spec.name in GRID, isinstance(spec.default, tuple)
        parser.add_argument(
            f"--{spec.name}",
            nargs="+" if cells or many else None,
            type=type(spec.default[0] if many else spec.default),
            default=GRID.get(spec.name, spec.default),
            help="each value is a cell of the grid" if cells else "per preference group" if many else "in every cell",
        )
    estimators = [*STOCK, *OURS, "pgrpo_global", *map(with_random_labels, OURS)]
    parser.add_argument("--estimators", nargs="+", default=estimators, help="name, or name:option=value,option=value")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--options", action="store_true", help="compare options of P-GRPO instead of estimators")
    modes.add_argument("--relatives", action="store_true", help="compare ours with what others have published")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each estimator in each cell")
    parser.add_argument("--rate", type=float, default=0.05, help="the common learning rate")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.1, 0.2, 0.4, 0.8], help="to choose from")
    parser.add_argument("--out", type=Path, help=f"the figure; without arguments {FIGURE.name} beside this file")
    if "--options" in argv:
        parser.set_defaults(estimators=OPTIONS, **OPTIONS_GRID)
    if "--relatives" in argv:
        parser.set_defaults(estimators=COMPARED)
    args = parser.parse_args(argv)
    try:
        if args.seeds < 2:
            raise ValueError(f"--seeds needs at least 2 for a standard error, got {args.seeds}")
        if not all(0 < rate < np.inf for rate in [args.rate, *args.rates]):
            raise ValueError(f"--rate and --rates need positive numbers, got {args.rate} and {args.rates}")
        shown.check_figure(parser, args.out)
        values = {spec.name: getattr(args, spec.name) for spec in fields(Scenario)}
        fixed = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items() if name not in GRID}
        cells = itertools.product(*(values[name] for name in GRID))
        scenarios = [Scenario(**dict(zip(GRID, cell)), **fixed) for cell in cells]
        contenders = {text: Contender.parse(text) for text in args.estimators}
        for text, contender in contenders.items():
            if min(args.samples) < contender.min_samples:
                raise ValueError(f"{text} needs --samples {contender.min_samples} or more, got {min(args.samples)}")
            if contender.name == "jspo" and args.prompts < 2:
                raise ValueError(f"jspo compares with other prompts: --prompts needs 2 or more, got {args.prompts}")
    except ValueError as problem:
        parser.error(str(problem))
    return args, scenarios, contenders


def main(argv: list[str]) -> None:
    args, scenarios, contenders = parse(argv)
    print(
        f"{len(scenarios)} cells, {args.seeds} seeds, learning rate {args.rate} or each its own best of {args.rates}\n"
        "mean, worst: normalised reward over the run, mean and worst preference group, ± standard error\n"
        f"+ and -: differs from the best of the host's by more than {CLEAR} paired standard errors\n"
        f"ratio: samples to a mean of {THRESHOLD}, over those of the fastest of the host's\n"
        "where none of the host's runs, an estimator is compared with itself without anything added"
    )
    results = run(scenarios, contenders, args.seeds, args.rate, args.rates)
    report(*results)
    out = args.out or (None if argv else FIGURE)
    if out:
        draw(results[0], out)
        print(f"\nfigure: {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
