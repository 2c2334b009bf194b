"""The Attributes experiment of reward factorization (arXiv 2503.06358), with attributes that code measures in texts.

    python examples/reproduce/pref_attributes.py [--data FOLDER] [--seeds 5] [--cache FOLDER] [--out FIGURE.png]

As in the paper, there are 7 attributes with two poles each, and 84 users. Each user likes two poles of two different
attributes. The prompts and answers of the paper are not public, and a large model judges them. Here an answer is one
of five to an instruction of the DSP data. The strength of an attribute is counted in its words (`attributes`) and
made standard normal over all texts by rank. A judge is asked twice and says "the first" with probability sigmoid(2
u), where u is the difference of the two texts' sums of the liked poles; two different replies are a tie. So the truth
is known, and linear with 7 base rewards. The paper trains its backbone. Here base rewards are linear

    in the attributes themselves, which is what a backbone that had learned them would give, and
    in frozen MiniLM embeddings of the texts, which hold little of the form.

63 users are seen: 1,000 pairs of 500 instructions, 50 users for each pair. The other 21 are new and are asked about
200 other pairs of these instructions; they are tested on 300 pairs of 100 others. Penalties are chosen by the answers
of seen users to pairs of the last 61. Methods and measure are those of pref_jester.py, and ties are left out of the
tests. "truth" is the AUC of the known u. The tastes of the 84 users cancel out: where the average of the seen users
leans one way, the others lean the other way. So a method that knows averages alone ends below 0.5.

Axes: as in pref_jester.py; an item is a text.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit, ndtri
from scipy.stats import rankdata

from pref_jester import (
    ANSWERS,
    CACHE,
    COLOURS,
    METHODS,
    Pairs,
    Penalties,
    World,
    annotate,
    auc,
    by_seed,
    compare,
    embeddings_of,
    sweep,
    tune,
)
from shown import arguments, error, number, save, subplots

FILE = "dsp_test.jsonl.gz"
DATA = Path(os.environ.get("DSP_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
FIGURE = Path(__file__).with_suffix(".png")
ATTRIBUTES = "length", "formality", "humour", "engagement", "politeness", "enthusiasm", "confidence"
USERS = [
    (one, two, sign, other)
    for one, two in itertools.combinations(range(len(ATTRIBUTES)), 2)
    for sign in (1, -1)
    for other in (1, -1)
]
SEEN, RATERS, PAIRS, POOL, TEST = 63, 50, 1000, 200, 300
TRAINED, VALIDATED = 500, 61  # instructions; the rest is for the test
FACTORS, SWEEP, SWEEP_ANSWERS = 6, tuple(range(1, 9)), 20
BLOCKS = "attributes", "embeddings"
WEAK = 1e-3  # a penalty that is as good as none
# Readings of the paper's figures: AUC by answers, and by base rewards
PAPER = {"ours": (None, 0.61, 0.77, 0.773, 0.832, 0.845), "ours, random": (None, None, None, 0.711, 0.749, 0.794),
         "per user": (None, None, None, 0.635, 0.655, 0.683), "shared": (0.644,) * 6}  # fmt: skip
PAPER_SWEEP = 0.633, 0.723, 0.752, 0.826, 0.837, 0.860, 0.850, 0.847
WORDS = {
    "humour": r"fun|funny|laugh\w*|jok\w+|humou?r\w*|hilari\w+|silly|comic\w*|playful\w*|witty|haha",
    "engagement": r"you|your|yours|let's|imagine|together",
    "politeness": r"please|thank\w*|sorry|certainly|of course|glad|happy to|welcome|appreciat\w+|kind\w*",
    "enthusiasm": r"amazing|exciting|excite\w*|great|wonderful|love\w*|incredible|fantastic|beautiful|best|perfect\w*",
    "hedge": r"may|might|could|perhaps|possibly|likely|seem\w*|generally|often|sometimes|usually|would|can",
    "informal": r"\w+'(?:t|re|ve|ll|m|d|s)|okay|ok|yeah|hey|stuff|lots|kinda|gonna|get|got",
}
PATTERNS = {name: re.compile(rf"\b(?:{words})\b") for name, words in WORDS.items()}


def attributes(text: str) -> list[float]:
    """How much a text has of each of ATTRIBUTES; only the order of texts counts."""
    text = text.lower().replace("’", "'")
    words = re.findall(r"[\w']+", text)
    size = max(len(words), 1)
    share = {name: len(pattern.findall(text)) / size for name, pattern in PATTERNS.items()}
    return [
        len(words),
        np.mean([len(word) for word in words] or [0]) - 20 * share["informal"],
        share["humour"],
        share["engagement"] + text.count("?") / size,
        share["politeness"],
        share["enthusiasm"] + text.count("!") / size,
        -share["hedge"],
    ]


def scores(texts: list[str]) -> np.ndarray:
    """(J, 7): the attributes of all texts, each made standard normal by rank; equal ones stay equal."""
    raw = np.array([attributes(text) for text in texts])
    normal = ndtri((rankdata(raw, axis=0) - 0.5) / len(raw))
    return (normal - normal.mean(0)) / normal.std(0)


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Texts, and for each the number of its instruction. Repeated answers to one instruction and empty ones are left
    out."""
    texts, owners = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row, record in enumerate(map(json.loads, file)):
            own = [text for text in dict.fromkeys(record["responses"].values()) if text.strip()]
            texts += own
            owners += [row] * len(own)
    return texts, np.array(owners)


def tastes() -> np.ndarray:
    """(84, 7): +1 or -1 for the two poles that each user likes."""
    found = np.zeros((len(USERS), len(ATTRIBUTES)))
    for row, (one, two, sign, other) in enumerate(USERS):
        found[row, [one, two]] = sign, other
    return found


class Judge(NamedTuple):
    """Who prefers which text: utility (84, J)."""

    utility: np.ndarray

    def ask(self, users: np.ndarray, pairs: np.ndarray, rng: np.random.Generator) -> Pairs:
        """Answers of users (U,) to all pairs (P, 2), each asked twice: 1, 0, or 0.5 if the two replies differ."""
        first, second = np.broadcast_to(pairs.T[:, None], (2, len(users), len(pairs)))
        chance = expit(2 * (self.utility[users[:, None], first] - self.utility[users[:, None], second]))
        return Pairs(first, second, (rng.random((2, *chance.shape)) < chance).mean(0))


class Draw(NamedTuple):
    """A world, its training and validation pairs for the penalties, and the AUC of the truth."""

    world: World
    training: Pairs
    validation: Pairs
    truth: float

    @classmethod
    def of(cls, judge: Judge, owners: np.ndarray, seed: int) -> "Draw":
        rng = np.random.default_rng(seed)
        users, queries = rng.permutation(len(USERS)), rng.permutation(owners.max() + 1)
        place = np.argsort(queries)[owners]
        known = pairs_of(owners, place < TRAINED, rng)
        training = judge.ask(users[:SEEN], known[:PAIRS], rng)
        silent = rng.random((SEEN, PAIRS)).argsort(0) >= RATERS  # RATERS users answer each pair
        training = training._replace(preference=np.where(silent, np.nan, training.preference))
        between = (place >= TRAINED) & (place < TRAINED + VALIDATED)
        validation = judge.ask(users[:SEEN], pairs_of(owners, between, rng), rng)
        pool = judge.ask(users[SEEN:], known[PAIRS : PAIRS + POOL], rng)
        test = judge.ask(users[SEEN:], pairs_of(owners, place >= TRAINED + VALIDATED, rng)[:TEST], rng)
        test = test._replace(preference=np.where(test.preference == 0.5, np.nan, test.preference))
        truth = np.take_along_axis(judge.utility[users[SEEN:]], test.first, 1)
        truth = truth - np.take_along_axis(judge.utility[users[SEEN:]], test.second, 1)
        return cls(World(*annotate(training), pool, (test,)), training, validation, auc(truth, test.preference).mean())


def pairs_of(owners: np.ndarray, part: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All pairs (P, 2) of two texts in `part` (J,) with one instruction, in random order and orientation."""
    first, second = np.triu_indices(len(owners), 1)
    rows = np.flatnonzero((owners[first] == owners[second]) & part[first])
    pairs = np.stack([first[rows], second[rows]], 1)
    return rng.permuted(pairs[rng.permutation(len(pairs))], axis=1)


class Result(NamedTuple):
    """By block, over seeds: AUC of methods (methods, answers, U), and of our method by base rewards (factors, U) and
    without a penalty (factors, U); the AUC of the truth."""

    methods: dict[str, list[np.ndarray]]
    factors: dict[str, list[np.ndarray]]
    free: dict[str, list[np.ndarray]]
    truth: list[float]


def run(judge: Judge, items: dict[str, np.ndarray], owners: np.ndarray, seeds: int) -> Result:
    result = Result(*({block: [] for block in BLOCKS} for _ in range(3)), [])
    for seed in range(seeds):
        drawn = Draw.of(judge, owners, seed)
        result.truth.append(drawn.truth)
        for block, table in items.items():
            l2 = tune(table, drawn.training, drawn.validation, FACTORS)
            counts = [count for count in SWEEP if count <= table.shape[1]]
            result.methods[block].append(compare(drawn.world, table, FACTORS, l2, seed)[0])
            for penalty, found in ((l2.factorized, result.factors), (WEAK, result.free)):
                found[block].append(sweep(drawn.world, table, counts, penalty, seed, SWEEP_ANSWERS)[0])
            print(f"seed {seed}, {block}: penalties {show(l2)}", flush=True)
    return result


def show(penalties: Penalties) -> str:
    return ", ".join(f"{kind} {l2:g}" for kind, l2 in penalties._asdict().items())


def report(result: Result) -> None:
    def table(title, head, rows):
        print(f"\n{title}\n{'':23}" + "".join(f"{name!s:>12}" for name in head))
        for name, cells in rows.items():
            print(f"{name!s:23}" + "".join(f"{cell:>12}" for cell in cells))

    def numbers(values):
        return [number(column) for column in np.moveaxis(values, 0, -1)]

    print(f"\ntruth: {number(np.array(result.truth))}")
    for block in BLOCKS:
        seen = by_seed(result.methods[block])
        rows = {method: numbers(seen[:, m]) for m, method in enumerate(METHODS)}
        table(f"{block}: AUC of new users by the number of answers", ANSWERS, rows)
    readings = {name: [f".{round(1000 * v):03}" if v else "" for v in values] for name, values in PAPER.items()}
    table("readings of the paper's figure", ANSWERS, readings)
    rows = {}
    for block in BLOCKS:
        rows[block] = numbers(by_seed(result.factors[block]))
        rows[f"{block}, no penalty"] = numbers(by_seed(result.free[block]))
    rows["the paper's figure"] = [f".{round(1000 * v):03}" for v in PAPER_SWEEP]
    table(f"ours after {SWEEP_ANSWERS} answers by base rewards", SWEEP, rows)


def draw_figure(result: Result, path: Path) -> None:
    """AUC by answers, for both kinds of base rewards, and by the number of base rewards."""
    fig, axes = subplots(1, 3, figsize=(12, 3.8))
    for ax, block in zip(axes, BLOCKS):
        seen = by_seed(result.methods[block])
        for m, (method, colour) in enumerate(COLOURS.items()):
            ax.errorbar(ANSWERS, seen[:, m].mean(0), error(seen[:, m]), color=colour, label=method, capsize=2, lw=1.2)
        ax.plot(ANSWERS[1:], PAPER["ours"][1:], "k:", lw=1, label="the paper's figure")
        ax.set(xlabel="answers of a new user", ylabel="AUC", xticks=ANSWERS)
        ax.set_title(f"base rewards of {block}", fontsize=10)
        values, free = by_seed(result.factors[block]), by_seed(result.free[block])
        counts = SWEEP[: values.shape[1]]
        (line, *_) = axes[2].errorbar(counts, values.mean(0), error(values), label=block, capsize=2, lw=1.2)
        axes[2].plot(counts, free.mean(0), "--", color=line.get_color(), lw=1, label=f"{block}, no penalty")
    axes[2].plot(range(1, 9), PAPER_SWEEP, "k:", lw=1, label="the paper's figure")
    axes[2].set(xlabel="base rewards", ylabel="AUC", xticks=SWEEP)
    axes[2].set_title(f"ours after {SWEEP_ANSWERS} answers", fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    axes[2].legend(fontsize=7)
    fig.tight_layout()
    save(fig, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help=f"the folder with {FILE}; also $DSP_DATA")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for the embeddings")
    parser.add_argument("--seeds", type=int, default=5, help="splits of users and instructions; default 5")
    parser.add_argument("--out", type=Path, help=f"the figure; without arguments {FIGURE.name} beside this file")
    args = arguments(parser, argv, FIGURE)
    if not (args.data / FILE).is_file():
        print(f"skipped: needs {FILE}, got none in {args.data}; name its folder by --data or $DSP_DATA")
        return
    texts, owners = read(args.data / FILE)
    found = scores(texts)
    correlation = np.corrcoef(found.T)
    print(f"{len(texts)} texts; strengths of the attributes' principal components: ", end="")
    print(" ".join(f"{value:.2f}" for value in np.linalg.eigvalsh(correlation)[::-1]), flush=True)
    items = {"attributes": found, "embeddings": embeddings_of(texts, args.cache)}
    result = run(Judge(tastes() @ found.T), items, owners, args.seeds)
    report(result)
    if args.out:
        draw_figure(result, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
