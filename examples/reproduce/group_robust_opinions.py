"""Group-robust preference optimisation (arXiv 2405.20304) on what five countries say, with a log-linear policy.

    python examples/reproduce/group_robust_opinions.py [--data FOLDER] [--seeds 20] [--cache FOLDER] [--out FIGURE.png]

This is not the paper's experiment. It uses a part of the paper's data, GlobalOpinionQA, and other countries. The
policy is a softmax of <phi(prompt, option), theta> over the options of a question; the reference policy is uniform.
phi is the mean over an option's tokens of the last hidden state of SmolLM2-135M, frozen, after a prompt that names
the country. It is reduced to the first principal components of the training options, centred within their cell, and
made white. All countries share one small theta, so they compete.

A cell is a question and a country. Its chosen option is the most frequent answer there. The rejected one is drawn
uniformly from the others; in validation and test all others count, each with the same weight. Options that are no
answer are dropped. Every seed splits the questions, not the cells, 80/10/10.

With h = <phi(chosen) - phi(rejected), theta>, the loss is -log sigmoid(beta h) for DPO and (h - 1/(2 beta))^2 for
IPO. Plain, IS and GR are settings of `GroupWeights`, updated with the countries' mean losses before each step of
gradient descent on all the data. Early stopping regularises. The moment to stop, the step size and eta are chosen in
the same way for all methods, for each seed alone: by the least worst-country loss on the validation questions. "Worst
in training" is the loss of the trained pairs after the last step, at the largest step sizes, without this choice.

Axes: R runs (seeds), C cells, O options, P pairs, D features, M settings, T moments to stop, G countries.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions
from openrlhf_pgrpo.files import whole_file
from shown import arguments, error, number, save, subplots

FILE = "globalopinionqa_union.jsonl.gz"
DATA = Path(os.environ.get("OPINIONS_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
CACHE = Path.home() / ".cache" / "openrlhf_pgrpo"
FIGURE = Path(__file__).with_suffix(".png")
NO_ANSWER = ("total", "dk", "don't know", "no answer", "missing", "other missing")  # beginnings, in lower case
AMONG = 20  # The five are chosen among these, with most questions: 130 countries have 300 million sets of five.
FEATURES = 32
BETA = {"DPO": 1.0, "IPO": 0.5}  # both only choose the unit of theta; that of IPO makes its loss 1 at the start
RATES = {"DPO": (0.03, 0.1), "IPO": (0.003, 0.01)}
ETAS = (0.01, 0.1, 1.0)
ITERATIONS = 1000  # at most
WEIGHTS = {"": {"chi": 0.0, "mu": "share"}, "IS-": {"chi": 0.0, "mu": "uniform"}, "GR-": {"sampling": "balanced"}}
COLOURS = {"": "#000000", "IS-": "#E69F00", "GR-": "#0072B2"}  # Okabe and Ito's, for the colour-blind too
MEASURES = ("worst loss", "average loss", "gap of losses", "worst accuracy", "average accuracy", "worst in training")


class Cell(NamedTuple):
    country: str
    question: str
    options: tuple[str, ...]
    shares: tuple[float, ...]


def read(path: Path) -> list[Cell]:
    """Cells with at least two options that are answers; shares are not rescaled."""
    cells = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            both = [(option.strip(), share) for option, share in zip(row["options"], row["dist"])]
            both = [(option, share) for option, share in both if not option.lower().startswith(NO_ANSWER)]
            if len(both) > 1 and sum(share for _, share in both) > 0:
                cells.append(Cell(row["group"], row["question"].strip(), *zip(*both)))
    return cells


def sharing(cells: list[Cell], countries: tuple[str, ...]) -> list[Cell]:
    """The countries' cells whose question at least two of them have."""
    own = [cell for cell in cells if cell.country in countries]
    times = Counter(cell.question for cell in own)
    return [cell for cell in own if times[cell.question] > 1]


def most_shared(cells: list[Cell], size: int = 5) -> tuple[str, ...]:
    """The countries with the most cells that share questions."""
    questions = defaultdict(set)
    for cell in cells:
        questions[cell.country].add(cell.question)
    most = sorted(questions, key=lambda country: (-len(questions[country]), country))[:AMONG]

    def shared(countries):
        times = Counter(itertools.chain.from_iterable(questions[country] for country in countries))
        return sum(count for count in times.values() if count > 1)

    return tuple(sorted(max(itertools.combinations(most, size), key=shared)))


def embed(cells: list[Cell], model_folder: Path) -> np.ndarray:
    """Features of all options of all cells, one below the other, (O, 576) float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)  # matrices are small: a second thread waits more than it helps on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="right")
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    heads = [f"\nMost people in {cell.country} answer:" for cell in cells for _ in cell.options]
    texts = [f"{head} {o}" for head, o in zip(heads, itertools.chain(*(cell.options for cell in cells)))]
    found, rows_of = np.zeros((len(texts), model.config.hidden_size), np.float32), defaultdict(list)
    for row, question in enumerate(cell.question for cell in cells for _ in cell.options):
        rows_of[question].append(row)

    def tokens(texts):
        batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
        return batch["input_ids"], batch["attention_mask"]

    with torch.inference_mode():
        for question, rows in rows_of.items():
            asked, _ = tokens([question])
            cache = model(asked, use_cache=True).past_key_values  # read once for all countries and options
            cache.batch_repeat_interleave(len(rows))
            ids, real = tokens([texts[row] for row in rows])
            mask = torch.cat([asked.new_ones(len(rows), asked.shape[1]), real], 1)
            hidden = model(ids, attention_mask=mask, past_key_values=cache).last_hidden_state
            skip = tokens([heads[row] for row in rows])[1].sum(1, keepdim=True)
            answer = (real * (torch.arange(ids.shape[1]) >= skip))[..., None]
            found[rows] = ((hidden * answer).sum(1) / answer.sum(1)).numpy()
    return found


def policy() -> Path:
    """The folder of SmolLM2-135M-Instruct, the demo's model; built at the first call."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "personas"))
    from models import build_policy

    return build_policy()


def features(cells: list[Cell], cache: Path) -> np.ndarray:
    """`embed` by the demo's model, kept in a folder for the next time; the name of the file follows from the texts."""
    texts = [(cell.question, cell.country, cell.options) for cell in cells]
    path = cache / f"opinions-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        print(f"features of {len(cells)} cells by SmolLM2-135M, once: some minutes", flush=True)
        found = embed(cells, policy())
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.save(file, found)
    return np.load(path).astype(np.float64)


class World(NamedTuple):
    """Everything random: trained pairs (R, C, D), one for every cell, and all pairs (R, P, D); three matrices that
    take means over a country, training (R, C, G), validation and test (R, P, G); numbers of training cells (R, G)."""

    pairs: np.ndarray
    every: np.ndarray
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    counts: np.ndarray

    @classmethod
    def draw(cls, cells: list[Cell], phi: np.ndarray, countries: tuple[str, ...], seeds: int) -> "World":
        lengths = np.array([len(cell.options) for cell in cells])
        starts = np.cumsum(lengths) - lengths
        best = np.array([int(np.argmax(cell.shares)) for cell in cells])
        owner = np.repeat(np.arange(len(cells)), lengths)
        loser = np.ones(len(owner), bool)
        loser[starts + best] = False
        difference = phi[(starts + best)[owner]] - phi
        phi = phi - (np.add.reduceat(phi, starts) / lengths[:, None])[owner]
        member = np.array([[cell.country == country for country in countries] for cell in cells], np.float64)
        names, question = np.unique([cell.question for cell in cells], return_inverse=True)

        def run(seed):
            rng = np.random.default_rng(seed)
            place = rng.permutation(len(names))[question] / len(names)
            parts = [place < 0.8, (place >= 0.8) & (place < 0.9), place >= 0.9]
            own = phi[parts[0][owner]]
            values, axes = np.linalg.eigh(own.T @ own / len(own))  # in rising order
            white = difference @ (axes[:, -FEATURES:] / np.sqrt(values[-FEATURES:]))
            rejected = rng.integers(lengths - 1)
            rejected = starts + rejected + (rejected >= best)
            counts = [(member * part[:, None]).sum(0) for part in parts]
            if np.min(counts) == 0:
                raise ValueError(f"every country needs questions for training, validation and test, got {counts}")
            means = [member * part[:, None] / count for part, count in zip(parts, counts)]
            whole = [(mean / (lengths - 1)[:, None])[owner[loser]] for mean in means[1:]]
            return white[rejected], white[loser], means[0], *whole, counts[0]

        return cls(*map(np.stack, zip(*map(run, range(seeds)))))


def loss_of(kind: str, h: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -BETA[kind] * h) if kind == "DPO" else np.square(h - 0.5 / BETA[kind])


def slope_of(kind: str, h: np.ndarray) -> np.ndarray:
    """The derivative of the loss by h."""
    return -BETA[kind] / (1 + np.exp(BETA[kind] * h)) if kind == "DPO" else 2 * h - 1 / BETA[kind]


def settings(kind: str) -> list[tuple[str, RobustOptions, float]]:
    """(method, options, step size) of every setting to try."""
    return [
        (prefix + kind, RobustOptions(eta=eta, **weights), rate)
        for prefix, weights in WEIGHTS.items()
        for rate in RATES[kind]
        for eta in (ETAS if prefix == "GR-" else ETAS[:1])  # the others' weights do not move
    ]


def learn(world: World, kind: str) -> dict[str, np.ndarray]:
    """Losses in all three parts, test accuracies and weights alpha after up to 40 numbers of iterations, each
    (T, R, M, G)."""
    tried, (runs, _, size) = settings(kind), world.pairs.shape
    rows, rates = np.arange(world.counts.shape[1]), np.array([rate for *_, rate in tried])
    weights = [[GroupWeights(o, dict(enumerate(counts))) for _, o, _ in tried] for counts in world.counts]
    points = {int(point) for point in np.geomspace(1, ITERATIONS, 40)}
    theta, found = np.zeros((runs, size, len(tried))), defaultdict(list)
    for iteration in range(1, ITERATIONS + 1):
        h = world.pairs @ theta
        losses = loss_of(kind, h).swapaxes(1, 2) @ world.training
        for own, means, counts in zip(weights, losses, world.counts):
            for one, mean in zip(own, means):
                one.update(rows, mean, counts)
        alpha = np.array([[one.alpha for one in own] for own in weights])
        slope = slope_of(kind, h) * (world.training @ alpha.swapaxes(1, 2))
        theta -= rates * (world.pairs.swapaxes(1, 2) @ slope)
        if iteration in points:
            h = world.every @ theta
            losses = loss_of(kind, h).swapaxes(1, 2)
            found["validation"].append(losses @ world.validation)
            found["loss"].append(losses @ world.test)
            found["accuracy"].append((h > 0).swapaxes(1, 2) @ world.test)
            found["alpha"].append(alpha)
            found["training"].append(loss_of(kind, world.pairs @ theta).swapaxes(1, 2) @ world.training)
    return {name: np.stack(values) for name, values in found.items()}


def choose(kind: str, found: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Method -> loss, accuracy, alpha (R, G) of the setting and the moment with the least worst-country validation
    loss, seed by seed; training (R, G), the loss of the last setting at the end."""
    chosen, worst = {}, found["validation"].max(-1)
    for method in dict.fromkeys(name for name, *_ in settings(kind)):
        columns = np.array([m for m, (name, *_) in enumerate(settings(kind)) if name == method])
        own = worst[:, :, columns].swapaxes(0, 1)  # (R, T, M)
        moment, column = np.unravel_index(own.reshape(len(own), -1).argmin(1), own.shape[1:])
        at = moment, np.arange(len(own)), columns[column]
        chosen[method] = {name: found[name][at] for name in ("loss", "accuracy", "alpha")}
        chosen[method]["training"] = found["training"][-1][:, columns[-1]]
    return chosen


def measures(result: dict[str, np.ndarray]) -> np.ndarray:
    """MEASURES (6, R)."""
    loss, accuracy, worst = result["loss"], result["accuracy"], result["loss"].max(1)
    gap, training = worst - loss.min(1), result["training"].max(1)
    return np.stack([worst, loss.mean(1), gap, accuracy.min(1), accuracy.mean(1), training])


def report(results: dict[str, dict], countries: tuple[str, ...]) -> None:
    def table(title, head, rows):
        print(f"\n{title}\n{'':16}" + "".join(f"{name:17}" for name in head).rstrip())
        for name, values in rows.items():
            print(f"{name:16}" + "".join(f"{number(value):17}" for value in values).rstrip())

    seen = {name: measures(result) for name, result in results.items()}
    pairs = [(a + kind, b + kind) for kind in BETA for a, b in (("GR-", ""), ("GR-", "IS-"), ("IS-", ""))]
    table("on test questions, except the last column", MEASURES, seen)
    table("differences, seed by seed", MEASURES, {f"{a} - {b}": seen[a] - seen[b] for a, b in pairs})
    for name in ("loss", "accuracy", "alpha"):
        table(f"{name} by country", countries, {method: result[name].T for method, result in results.items()})


def draw(results: dict[str, dict], countries: tuple[str, ...], path: Path) -> None:
    """Loss and accuracy by country on test questions."""
    fig, axes = subplots(2, 2, figsize=(9, 6.5), sharex=True)
    for (name, kind), ax in zip(itertools.product(("loss", "accuracy"), BETA), axes.flat):
        for m, (prefix, colour) in enumerate(COLOURS.items()):
            values = results[prefix + kind][name]
            worst = values.max(1) if name == "loss" else values.min(1)
            values = np.column_stack([values, values.mean(1), worst])
            places = np.arange(values.shape[1]) + 0.2 * (m - 1)
            style = {"fmt": "o", "ms": 4, "color": colour, "capsize": 2, "label": prefix + kind}
            ax.errorbar(places, values.mean(0), error(values), **style)
        ax.set_xticks(range(len(places)), [*countries, "average", "worst\nper seed"], fontsize=8, rotation=30)
        ax.set_title(f"{kind}: {name} on test questions", fontsize=10)
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    save(fig, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help=f"the folder with {FILE}; also $OPINIONS_DATA")
    parser.add_argument("--countries", nargs="+", help="instead of the five with the most cells that share questions")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder for the features of the frozen model")
    parser.add_argument("--seeds", type=int, default=20, help="splits of the questions; default 20")
    parser.add_argument("--out", type=Path, help=f"the figure; without arguments {FIGURE.name} beside this file")
    args = arguments(parser, argv, FIGURE)
    if not (args.data / FILE).is_file():
        print(f"skipped: needs {FILE}, got none in {args.data}; name its folder by --data or $OPINIONS_DATA")
        return
    cells = read(args.data / FILE)
    countries = tuple(args.countries or most_shared(cells))
    if unknown := set(countries) - {cell.country for cell in cells}:
        parser.error(f"--countries needs countries of {FILE}, got {', '.join(sorted(unknown))}")
    cells = sharing(cells, countries)
    best = {cell.question: set() for cell in cells}
    for cell in cells:
        best[cell.question].add(cell.options[int(np.argmax(cell.shares))])
    alike = np.mean([len(answers) == 1 for answers in best.values()])
    print(", ".join(f"{country} {count}" for country, count in sorted(Counter(c.country for c in cells).items())))
    print(f"{len(cells)} cells on {len(best)} questions; all choose alike on {alike:.0%} of them", flush=True)
    world = World.draw(cells, features(cells, args.cache), countries, args.seeds)
    results = {name: r for kind in BETA for name, r in choose(kind, learn(world, kind)).items()}
    report(results, countries)
    if args.out:
        draw(results, countries, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
