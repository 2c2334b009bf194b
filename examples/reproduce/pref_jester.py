"""Reward factorization (arXiv 2503.06358) on real ratings: 5,000 people, 100 jokes, new users asked up to 20 times.

    python examples/reproduce/pref_jester.py [--data FOLDER] [--seeds 5] [--cache FOLDER] [--out FIGURE.png]

A pair is two jokes that a person rated differently, and the answer is the one rated higher. 3,000 people are seen, and
2,000 of them, drawn anew by every seed, answer 40 pairs each; 300 of the other 2,000 are the new users. 70 jokes are
seen, the other 30 are not. Base rewards are linear in a representation of the joke:

    embeddings     MiniLM, frozen; asked about pairs of seen jokes, tested on pairs of unseen ones
    same jokes     the same embeddings, tested on other pairs of the seen jokes
    item numbers   one-hot: they know nothing of an unseen joke, so only pairs can be held out, as above

Every new user has a pool of 100 pairs to be asked about and 100 to be tested on; the measure is the user's ROC-AUC.

    ours           population prior, MAP, and the question of most expected information
    ours, random   the same with random questions
    released       our base rewards, with estimator and rule of the released code, as described: no prior, random
                   start, 5,000 steps of gradient descent at rate 0.01 on the mean loss; the pair with the largest
                   s'^2 v'M^-1 v, M = 0.001 I + sum s' v v' over the answers, after a random first one
    simplex        coefficients that are a softmax, as LoRe's (arXiv 2504.14439): 500 steps of Adam at rate 0.1 from
                   equal weights, random questions
    per user       ridge logistic regression on the new user's answers alone, random questions
    shared         one reward for all: Bradley-Terry

The penalty of each method is chosen beforehand, on seen people of one more seed: for the first representation by pairs
of held-out jokes, for the others by held-out pairs.

Axes: S seeds, U users, P pairs of a pool, Q questions, D base rewards, H dimensions, J jokes.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import rankdata

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.cross_validation import Choice, choose_factors
from openrlhf_pgrpo.core.factorization import Factorization, NotCarried, fit
from openrlhf_pgrpo.core.posterior import Prior, posteriors
from openrlhf_pgrpo.core.questions import information
from openrlhf_pgrpo.files import whole_file
from pref_baselines import per_user, released, shared, simplex
from shown import arguments, error, number, save, subplots

FILES = "jester5k.csv.gz", "jester_jokes.json"
DATA = Path(os.environ.get("JESTER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
CACHE = Path.home() / ".cache" / "openrlhf_pgrpo"
FIGURE = Path(__file__).with_suffix(".png")
SEEN_PEOPLE, TRAINING, NEW, SEEN_JOKES = 3000, 2000, 300, 70
PAIRS, POOL, TEST = 40, 100, 100  # of each user
ANSWERS = (0, 1, 3, 5, 10, 20)
TUNING = 1_000_000  # a seed that no run will have
FACTORS, SWEEP = 8, tuple(range(1, 13))
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
BLOCKS = "embeddings", "same jokes", "item numbers"
METHODS = "ours", "ours, random", "released", "simplex", "per user", "shared"
COLOURS = dict(zip(METHODS, ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#000000")))  # Okabe and Ito's


class Pairs(NamedTuple):
    """Pairs of each user, (U, P): the jokes `first` and `second`, and the preference, 1 for the first and 0 for the
    second; NaN where a user has fewer pairs."""

    first: np.ndarray
    second: np.ndarray
    preference: np.ndarray

    def at(self, index) -> "Pairs":
        return Pairs(*(part[index] for part in (self.first, self.second, self.preference)))

    def start(self, count: int) -> "Pairs":
        """The first `count` pairs of each user (U, count). Missing pairs come last."""
        order = np.isnan(self.preference).argsort(1, kind="stable")[:, :count]
        return Pairs(*(np.take_along_axis(part, order, 1) for part in self))

    def differences(self, table: np.ndarray) -> np.ndarray:
        """Differences (U, P, D) of the two jokes in a table (J, D)."""
        return table[self.first] - table[self.second]

    def logits(self, table: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """(U, P) for base rewards of jokes (J, D) and coefficients (U, D)."""
        rewards = coefficients @ table.T
        rows = np.arange(len(rewards))[:, None]
        return rewards[rows, self.first] - rewards[rows, self.second]


def read(path: Path) -> np.ndarray:
    """Ratings (people, jokes); NaN where there is none."""
    rows = np.loadtxt(path, delimiter=",", skiprows=1)
    person, joke = rows[:, :2].astype(int).T
    ratings = np.full((person.max() + 1, joke.max() + 1), np.nan)
    ratings[person, joke] = rows[:, 2]
    return ratings


def draw(ratings: np.ndarray, jokes: np.ndarray, size: int, rng: np.random.Generator) -> Pairs:
    """Up to `size` different random pairs of `jokes`, rated differently, for each person (U) in `ratings`."""
    left, right = np.triu_indices(len(jokes), 1)
    first, second = jokes[left], jokes[right]
    columns = []
    for row in ratings:
        rows = np.flatnonzero(np.abs(row[first] - row[second]) > 0)  # neither equal nor missing
        rows = rng.permutation(rows)[:size]
        turned = rng.random(len(rows)) < 0.5
        one, two = np.where(turned, second[rows], first[rows]), np.where(turned, first[rows], second[rows])
        missing = (0, size - len(rows))
        answers = np.pad((row[one] > row[two]).astype(float), missing, constant_values=np.nan)
        columns.append((np.pad(one, missing), np.pad(two, missing), answers))
    return Pairs(*map(np.array, zip(*columns)))


class World(NamedTuple):
    """Everything random except random questions: annotations of seen people on pairs of jokes, `distinct` (2, P); the
    pool of new users; and their two tests, on unseen and on seen jokes."""

    annotations: Annotations
    distinct: np.ndarray
    pool: Pairs
    tests: tuple[Pairs, ...]

    @classmethod
    def draw(cls, ratings: np.ndarray, seed: int) -> "World":
        rng = np.random.default_rng(seed)
        people = np.random.default_rng(0).permutation(len(ratings))  # nobody is seen in one run and new in another
        old = rng.permutation(people[:SEEN_PEOPLE])[:TRAINING]
        new = rng.permutation(people[SEEN_PEOPLE:])[:NEW]
        jokes = rng.permutation(ratings.shape[1])
        training = draw(ratings[old], jokes[:SEEN_JOKES], PAIRS, rng)
        both = draw(ratings[new], jokes[:SEEN_JOKES], POOL + TEST, rng)
        unseen = draw(ratings[new], jokes[SEEN_JOKES:], TEST, rng)
        whole = ~np.isnan(both.preference[:, :POOL]).any(1)  # those who rated most jokes alike have too few pairs
        both, unseen = both.at(whole), unseen.at(whole)
        return cls(*annotate(training), both.at(np.s_[:, :POOL]), (unseen, both.at(np.s_[:, POOL:])))


def annotate(pairs: Pairs) -> tuple[Annotations, np.ndarray]:
    """Annotations of the users (U,) who have pairs, and the distinct pairs (2, P) they are about."""
    user, place = np.nonzero(~np.isnan(pairs.preference))
    cells = np.stack([pairs.first[user, place], pairs.second[user, place]])
    distinct, pair = np.unique(cells, axis=1, return_inverse=True)
    names, user = np.unique(user, return_inverse=True)
    return Annotations(user, pair.ravel(), pairs.preference[~np.isnan(pairs.preference)], names.astype(str)), distinct


def differences(items: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """X (P, H) of pairs (2, P) of jokes that are represented by items (J, H)."""
    return items[distinct[0]] - items[distinct[1]]


# --- training --------------------------------------------------------------------------------------------------------


class Penalties(NamedTuple):
    """The l2 of each method for one way to represent jokes."""

    factorized: float
    simplex: float
    shared: float
    alone: float


def tune(items: np.ndarray, training: Pairs, validation: Pairs, factors: int) -> Penalties:
    """The penalty of each method with the least log loss on the validation pairs.

    Every user needs training pairs; one model per user is trained on 10 of them.
    """
    known = ~np.isnan(validation.preference)

    def best(learn, pairs: Pairs) -> float:
        annotations, distinct = annotate(pairs)
        losses = []
        for l2 in PENALTIES:
            try:
                table, coefficients = learn(differences(items, distinct), annotations, l2)
            except NotCarried:
                losses.append(np.inf)
                continue
            z = validation.logits(table, coefficients)
            losses.append((np.logaddexp(0, z) - validation.preference * z)[known].mean())
        return PENALTIES[int(np.argmin(losses))]

    def of(method, *count):
        def learn(X, annotations, l2):
            found = method(X, annotations, *count, l2)
            return found.features(items), found.coefficients

        return learn

    return Penalties(
        best(of(fit, factors), training),
        best(of(simplex, factors), training),
        best(of(shared), training),
        best(lambda X, annotations, l2: (items, per_user(X, annotations, l2)), training.start(10)),
    )


def tuning_pairs(ratings: np.ndarray, by_joke: bool) -> tuple[Pairs, Pairs]:
    """Training and validation pairs of seen people. They are of different jokes if `by_joke`."""
    rng = np.random.default_rng(TUNING)
    own = ratings[np.random.default_rng(0).permutation(len(ratings))[:TRAINING]]
    jokes = rng.permutation(ratings.shape[1])[:SEEN_JOKES]
    if by_joke:
        split = SEEN_JOKES * 5 // 7
        training, validation = draw(own, jokes[:split], PAIRS, rng), draw(own, jokes[split:], PAIRS, rng)
    else:
        both = draw(own, jokes, 2 * PAIRS, rng)
        training, validation = both.at(np.s_[:, :PAIRS]), both.at(np.s_[:, PAIRS:])
    enough = ~np.isnan(training.preference[:, :10]).any(1)
    return training.at(enough), validation.at(enough)


# --- new users -------------------------------------------------------------------------------------------------------


def interview(features: np.ndarray, answers: np.ndarray, estimate, score, rng: np.random.Generator):
    """Coefficients (U, D) after 0, 1, 2 ... questions. Each question is the pair of the user's pool, with features
    (U, P, D) and answers (U, P), of largest `score`. It is random without a score, and the first also for `released`.

    `estimate` turns the features (U, n, D) and answers (U, n) so far into means (U, D) and covariances (U, D, D).
    """
    users, pool, _ = features.shape
    free, rows, asked = np.ones((users, pool), bool), np.arange(users)[:, None], np.empty((users, 0), int)
    while True:
        mean, covariance = estimate(features[rows, asked], answers[rows, asked])
        yield mean
        value = rng.random((users, pool))
        if score and (asked.size or score is not released):
            middle = np.einsum("upd,ud->up", features, mean, optimize=True)
            spread = np.einsum("upd,ude,upe->up", features, covariance, features, optimize=True)
            value = score(middle.ravel(), spread.ravel()).reshape(users, pool) + 1e-12 * value  # ties are broken
        asked = np.column_stack([asked, np.where(free, value, -np.inf).argmax(1)])
        free[rows[:, 0], asked[:, -1]] = False


class Released:
    """The released code's estimator, see above; the covariance is M^-1. Without answers it is the random start."""

    def __init__(self, rng: np.random.Generator, steps: int = 5000):
        self.rng, self.steps = rng, steps

    def __call__(self, features, answers):
        users, count, size = features.shape
        found = self.rng.normal(size=(users, size))
        rows, columns = np.ascontiguousarray(features), np.ascontiguousarray(features.swapaxes(1, 2))
        for _ in range(self.steps if count else 0):
            residual = expit((rows @ found[..., None])[..., 0]) - answers
            found -= 0.01 / count * (columns @ residual[..., None])[..., 0]
        chance = expit((rows @ found[..., None])[..., 0])
        return found, np.linalg.inv(0.001 * np.eye(size) + columns @ (rows * (chance * (1 - chance))[..., None]))


def lore(features: np.ndarray, answers: np.ndarray, steps: int = 500, rate: float = 0.1):
    """Softmax coefficients by Adam, see above; no covariance."""
    logits = np.zeros((len(features), features.shape[2]))
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    for step in range(1, steps + 1 if answers.size else 1):
        weights = softmax(logits, axis=1)
        residual = expit(np.einsum("und,ud->un", features, weights)) - answers
        slope = np.einsum("und,un->ud", features, residual) / answers.shape[1]
        slope = weights * (slope - (weights * slope).sum(1, keepdims=True))
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        logits -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return softmax(logits, axis=1), None


def alone(features: np.ndarray, answers: np.ndarray, l2: float):
    """`per_user` of the answers so far; no covariance."""
    users, count, size = features.shape
    if not count:
        return np.zeros((users, size)), None
    user, pair = np.repeat(np.arange(users), count), np.arange(users * count)
    known = Annotations(user, pair, answers.ravel(), [str(row) for row in range(users)])
    return per_user(features.reshape(-1, size), known, l2), None


def auc(logits: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """ROC-AUC (U,) of each user's pairs; NaN for users all of whose answers are the same."""
    known = ~np.isnan(preference)
    ranks = rankdata(np.where(known, logits, np.inf), axis=1)  # missing pairs come last and change no other rank
    yes = np.where(known, preference, 0)
    hits, count = yes.sum(1), known.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ranks * yes).sum(1) - hits * (hits + 1) / 2) / (hits * (count - hits))


# --- what is compared ------------------------------------------------------------------------------------------------


def measure(world: World, table: np.ndarray, estimate, score, seed: int, answers=ANSWERS) -> np.ndarray:
    """The AUC (tests, answers, U) after each number of answers, with base rewards of items (J, D)."""
    features = world.pool.differences(table)
    asking = interview(features, world.pool.preference, estimate, score, np.random.default_rng(seed))
    found = [own for n, own in zip(range(max(answers) + 1), asking) if n in answers]
    return np.array([[auc(test.logits(table, own), test.preference) for own in found] for test in world.tests])


def factorize(world: World, items: np.ndarray, factors: int, l2: float) -> Factorization:
    """Our fit with this many base rewards, or with as many as the data carry with this penalty."""
    X = differences(items, world.distinct)
    while True:
        try:
            return fit(X, world.annotations, factors, l2)
        except NotCarried as error:
            factors = error.carried


def sweep(world: World, items: np.ndarray, counts, l2: float, seed: int, answers: int) -> np.ndarray:
    """AUC (tests, factors, U) of our method by the number of base rewards. Those that are not carried add nothing."""
    curve, carried = [], True
    for count in counts:
        if carried:
            found = factorize(world, items, count, l2)
            carried = len(found.head) == count
            bayes = partial(posteriors, prior=Prior.of(found.coefficients))
            measured = measure(world, found.features(items), bayes, information, seed, (answers,))[:, 0]
        curve.append(measured)
    return np.stack(curve, 1)


def compare(world: World, items: np.ndarray, factors: int, l2: Penalties, seed: int) -> np.ndarray:
    """The AUC (tests, methods, answers, U)."""
    own, X = factorize(world, items, factors, l2.factorized), differences(items, world.distinct)
    weights, one = simplex(X, world.annotations, factors, l2.simplex), shared(X, world.annotations, l2.shared)
    bayes = partial(posteriors, prior=Prior.of(own.coefficients))
    runs = (
        (own.features(items), bayes, information),
        (own.features(items), bayes, None),
        (own.features(items), Released(np.random.default_rng(seed)), released),
        (weights.features(items), lore, None),
        (items, partial(alone, l2=l2.alone), None),
        (one.features(items), lambda features, answers: (np.ones((len(features), 1)), None), None),
    )
    return np.stack([measure(world, *each, seed) for each in runs], 1)


class Result(NamedTuple):
    """By block: AUC of methods (methods, answers, U) and of our method by factors (factors, U), in a list over
    seeds."""

    methods: dict[str, list[np.ndarray]]
    factors: dict[str, list[np.ndarray]]


def representations(embeddings: np.ndarray) -> tuple[np.ndarray, ...]:
    """The representation (J, H) of jokes in each of BLOCKS."""
    return embeddings, embeddings, np.eye(len(embeddings))


def run(ratings: np.ndarray, embeddings: np.ndarray, penalties: list[Penalties], seeds: int) -> Result:
    result = Result({block: [] for block in BLOCKS}, {block: [] for block in BLOCKS})
    for seed in range(seeds):
        whole = World.draw(ratings, seed)
        for block, test, items, l2 in zip(BLOCKS, (0, 1, 1), representations(embeddings), penalties):
            world = whole._replace(tests=whole.tests[test : test + 1])
            result.methods[block].append(compare(world, items, FACTORS, l2, seed)[0])
            result.factors[block].append(sweep(world, items, SWEEP, l2.factorized, seed, 10)[0])
        print(f"seed {seed} done", flush=True)
    return result


# --- what is shown ---------------------------------------------------------------------------------------------------


def by_seed(results: list[np.ndarray]) -> np.ndarray:
    """Means over users, (S, ...)."""
    return np.stack([np.nanmean(own, -1) for own in results])


def error_over_users(results: list[np.ndarray]) -> np.ndarray:
    """Standard error over the users of one seed, the mean over seeds."""
    return np.mean([np.nanstd(own, -1, ddof=1) / np.sqrt((~np.isnan(own)).sum(-1)) for own in results], 0)


def report(result: Result) -> None:
    def table(title, head, rows):
        print(f"\n{title}\n{'':24}" + "".join(f"{name!s:>12}" for name in head))
        for name, values in rows.items():
            print(f"{name!s:24}" + "".join(f"{number(column):>12}" for column in np.moveaxis(values, 0, -1)))

    for block in BLOCKS:
        seen = by_seed(result.methods[block])
        rows = dict(zip(METHODS, np.moveaxis(seen, 1, 0)))
        table(f"{block}: AUC of new users by the number of answers", ANSWERS, rows)
        table("differences, seed by seed", ANSWERS, {f"ours - {m}": seen[:, 0] - rows[m] for m in METHODS[1:]})
        print(f"standard error over the users of a seed: up to {error_over_users(result.methods[block]).max():.3f}")
    rows = {block: by_seed(result.factors[block]) for block in BLOCKS}
    for part in (SWEEP[:6], SWEEP[6:]):
        columns = [SWEEP.index(count) for count in part]
        table("ours after 10 answers by base rewards", part, {name: row[:, columns] for name, row in rows.items()})


def draw_figure(result: Result, choice: Choice, path: Path) -> None:
    """AUC by answers and method, AUC by base rewards, and the cross-validated curve."""
    fig, axes = subplots(2, 2, figsize=(9, 6.5))
    for ax, block in zip(axes.flat, (BLOCKS[0], BLOCKS[2])):
        seen = by_seed(result.methods[block])
        for m, (method, colour) in enumerate(COLOURS.items()):
            ax.errorbar(ANSWERS, seen[:, m].mean(0), error(seen[:, m]), color=colour, label=method, capsize=2, lw=1.2)
        where = "unseen jokes" if block == "embeddings" else "pairs of known jokes"
        ax.set(xlabel="answers of a new user", ylabel="AUC", xticks=ANSWERS)
        ax.set_title(f"{block}: {where}", fontsize=10)
    axes[0, 1].legend(fontsize=7)
    for block in BLOCKS:
        values = by_seed(result.factors[block])
        axes[1, 0].errorbar(SWEEP, values.mean(0), error(values), label=block, capsize=2, lw=1.2)
    axes[1, 0].set(xlabel="base rewards", ylabel="AUC", xticks=SWEEP)
    axes[1, 0].set_title("ours after 10 answers", fontsize=10)
    axes[1, 0].legend(fontsize=7)
    axes[1, 1].errorbar(choice.factors, choice.loss, choice.error, color="#0072B2", capsize=2, lw=1.2)
    axes[1, 1].axvline(choice.recommended, color="#000000", ls=":", label=f"recommended: {choice.recommended}")
    axes[1, 1].set(xlabel="base rewards", ylabel="held-out log loss", xticks=SWEEP)
    axes[1, 1].set_title("item numbers: cross-validation among seen people", fontsize=10)
    axes[1, 1].legend(fontsize=7)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save(fig, path)


def embed(texts: list[str], model_folder: Path) -> np.ndarray:
    """The mean over a text's tokens of MiniLM's last hidden state, (J, 384) float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)  # texts are short: a second thread waits more than it helps on a busy machine
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModel.from_pretrained(model_folder).eval()
    found = []
    with torch.inference_mode():
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
            found.append(model(**tokens).last_hidden_state[0].mean(0).numpy())
    return np.stack(found)


def embedder() -> Path:
    """The folder of MiniLM-L6-v2, the demo's model."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "personas"))
    from models import minilm_folder

    return minilm_folder()


def embeddings_of(texts: list[str], cache: Path) -> np.ndarray:
    """`embed`, kept in a folder for the next time; the name of the file follows from the texts."""
    path = cache / f"minilm-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        print(f"embeddings of {len(texts)} texts by MiniLM, once", flush=True)
        found = embed(texts, embedder())
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, found)
    return np.load(path).astype(np.float64)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Jester's two files; also $JESTER_DATA")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for the embeddings")
    parser.add_argument("--seeds", type=int, default=5, help="splits of people, jokes and pairs; default 5")
    parser.add_argument("--out", type=Path, help=f"the figure; without arguments {FIGURE.name} beside this file")
    args = arguments(parser, argv, FIGURE)
    for name in FILES:
        if not (args.data / name).is_file():
            print(f"skipped: needs {name}, got none in {args.data}; name its folder by --data or $JESTER_DATA")
            return
    ratings = read(args.data / FILES[0])
    embeddings = embeddings_of(json.loads((args.data / FILES[1]).read_text(encoding="utf-8")), args.cache)
    ways = [*zip(BLOCKS, representations(embeddings), (True, False, False))]
    penalties = [tune(items, *tuning_pairs(ratings, by_joke), FACTORS) for _, items, by_joke in ways]
    for block, own in zip(BLOCKS, penalties):
        print(f"penalties, {block}: " + ", ".join(f"{kind} {l2:g}" for kind, l2 in own._asdict().items()), flush=True)
    world = World.draw(ratings, TUNING)
    print("\nitem numbers, cross-validation on pairs of seen people")
    X, l2 = differences(ways[-1][1], world.distinct), penalties[-1].factorized
    choice = choose_factors(X, world.annotations, SWEEP, (l2,), folds=3)
    print(choice, flush=True)
    result = run(ratings, embeddings, penalties, args.seeds)
    report(result)
    if args.out:
        draw_figure(result, choice, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
