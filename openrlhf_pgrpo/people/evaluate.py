"""Evaluates a factorized reward model on held-out pairs: how well it predicts the people it knows, and new ones.

    p(u prefers the first answer) = sigmoid(lambda_u . (phi(first) - phi(second)))

Three predictions are compared: lambda_u is the user's own; it is the average of the trained users ("one reward for
all"); or the majority, what all other people in the data prefer of the same pair. For a person whom the model does not
know, pairs of a third of the texts are held out, and lambda_u is learned from real answers to pairs of the others, as
`elicit` learns it.
`core/evaluation.py` says what is measured and what the errors mean.

Axes: U users, P pairs, D base rewards, N annotations.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.core.asking import coefficients_after, hold_out, parts, pools
from openrlhf_pgrpo.core.evaluation import (
    METRICS,
    contributions,
    majority,
    mean_and_error,
    of_users,
    quantile,
    reliability,
)
from openrlhf_pgrpo.core.names import Names, alike, alike_listed, listed
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import write_whole
from openrlhf_pgrpo.models.comparisons import read
from openrlhf_pgrpo.models.factorize import annotate, check_texts, write_texts
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.scoring import MOST_TEXTS, texts_of
from openrlhf_pgrpo.models.tables import COLUMNS, Columns
from openrlhf_pgrpo.people.pool import base_rewards
from openrlhf_pgrpo.progress import progress

ASKED = (0, 1, 3, 5, 10, 20)  # answers of a new user
DRAWS = 5  # of random questions
SEED = 0  # of what is held out of new users, and of random questions
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
USERS_AT_ONCE, CELLS_AT_ONCE = 256, 2**20  # who are asked, and their pools, which are padded to one size
OWN, SHARED, MAJORITY = "own coefficients", "one reward for all", "majority of the others"
CHOSEN, RANDOM = "by information", "at random"
UNKNOWN = {"value": None, "error": None}


class Said(NamedTuple):
    """Annotations: user, pair (N,) row numbers, preference (N,), and the preference group (N,) of each, if any."""

    user: np.ndarray
    pair: np.ndarray
    preference: np.ndarray
    group: np.ndarray | None

    def select(self, rows: np.ndarray) -> "Said":
        return Said(*(None if column is None else column[rows] for column in self))


def evaluate(
    model: str,
    data: Path,
    output: Path | None = None,
    scores: Path | None = None,
    columns: Columns = COLUMNS,
    pref_group_key: str | None = None,
    chat_template: str | None = None,
    split: str | None = None,
    batch_size: int = MOST_TEXTS,
    pairs_per_user: int | None = None,
    seed: int = 0,
) -> dict:
    """Everything that was measured, as JSON can hold it: None is a number that does not exist.

    Args:
        data, split, pairs_per_user, seed: as `comparisons.read` takes them. output: file for the result. It is written
            when the known people are done, with `finished` false, and again at the end. scores: file that keeps the
            base rewards; it is read if it exists. pref_group_key: column with the preference group of the row's user.

    Raises:
        ValueError: arguments or files that do not fit. OSError: a file cannot be read or written.
    """
    comparisons = read(data, columns, split, pairs_per_user, seed)
    groups = None if pref_group_key is None else comparisons.names(pref_group_key, "preference group")
    for sentence in comparisons.said:
        print(sentence, flush=True)
    folder = Folder(model, chat_template)
    written = write_texts(comparisons, folder.writer)
    # By preference group first: whoever gave one answer twice, for two groups, counts in any order of rows alike.
    by_group = range(len(written)) if groups is None else sorted(range(len(written)), key=groups.__getitem__)
    pairs, annotations, order = annotate([written[row] for row in by_group])
    of_rows = None if groups is None else np.array([groups[by_group[row]] for row in order], object)
    said = Said(annotations.user, annotations.pair, annotations.preference, of_rows)
    for sentence in check_texts(comparisons, written, pairs, folder.texts):
        print(sentence, flush=True)
    v = np.subtract(*base_rewards(folder, pairs, scores, batch_size, chat_template))
    known = Names(folder.users)
    new = [user for user in annotations.users if user not in known]
    if same := [names for names in alike([*known, *new]) if (known.find(names) < 0).any()]:
        print(f"warning: users count as people of their own whose names {alike_listed(same)}", flush=True)
    result: dict = {
        "model": {"name": model, "fingerprint": folder.fingerprint},
        "data": str(data),
        "version": __version__,
        "settings": {
            "columns": columns._asdict(),
            "pref_group_key": pref_group_key,
            "split": split,
            "pairs drawn of each user": pairs_per_user,
            "seed of drawn pairs": seed,
            "held out of each new user": "pairs of a third of the texts",
            "draws of random questions": DRAWS,
            "seed": SEED,
        },
        "counts": {
            "answers": len(annotations),
            "ties": int((said.preference == 0.5).sum()),
            "pairs": len(pairs),
            "people": len(annotations.users),
            "people the model knows": len(annotations.users) - len(new),
        },
        "finished": False,
    }
    predictions = Predictions(v, said, annotations.users, folder.coefficients, known, texts_of(pairs)[1])
    result["known"] = predictions.known_people()
    if output is not None:
        write_whole(output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    result["new"] = predictions.new_people()
    result["notes"] = notes(result)
    result["finished"] = True
    if output is not None:
        write_whole(output, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


class Predictions:
    """What a model says about annotations.

    Args:
        v: (P, D) differences of base rewards. said: of `users`, in the order of users and pairs. coefficients, known:
            of the trained users. texts: (P, 2) numbers as of `texts_of`.
    """

    def __init__(
        self,
        v: np.ndarray,
        said: Said,
        users: Sequence[str],
        coefficients: np.ndarray,
        known: Names,
        texts: np.ndarray,
    ):
        self.v, self.said, self.users, self.coefficients, self.texts = v, said, users, coefficients, texts
        self.row = known.find(users)[said.user]
        self.shared = v[said.pair] @ coefficients.mean(0)
        self.majority = majority(said.user, said.pair, said.preference)

    def known_people(self) -> dict | None:
        """Measures of the people whom the model knows; None if the data have none."""
        mine = self.row >= 0
        if not mine.any():
            return None
        said, shared = self.said.select(mine), self.shared[mine]
        own = np.einsum("nd,nd->n", self.v[said.pair], self.coefficients[self.row[mine]])
        rows, user = np.unique(said.user, return_inverse=True)
        each, base = (of_users(z, said.preference, user, len(rows)) for z in (own, shared))
        better = (1 + np.sign(base["log_loss"] - each["log_loss"])) / 2
        return {
            OWN: measure([own], shared, said),
            SHARED: measure([shared], shared, said),
            MAJORITY: measure([self.majority[mine]], shared, said),
            "reliability": {OWN: reliability(own, said.preference), SHARED: reliability(shared, said.preference)},
            "better off than with one reward for all": number(mean_and_error(better, np.arange(len(rows)))),
            "quantiles": {
                f"{share:g}": {name: number(quantile(x, share)) for name, x in each.items()} for share in QUANTILES
            },
            "each": {
                self.users[row]: {name: finite(x[place]) for name, x in each.items()} for place, row in enumerate(rows)
            },
        }

    def new_people(self) -> dict | None:
        """Measures of the people whom the model does not know, by the number of their answers; None if the data have
        none. Those with fewer pairs than are to be asked are left out of that number. `neither` is the number of
        answers that are neither asked for nor held out, as `hold_out`."""
        new = np.flatnonzero(self.row < 0)
        if not len(new):
            return None
        said = self.said.select(new)
        # Who was asked the same twice has one answer, the mean of both.
        cells, first, cell = np.unique(
            np.stack([said.user, said.pair], 1), axis=0, return_index=True, return_inverse=True
        )
        mean = np.bincount(cell.ravel(), said.preference) / np.bincount(cell.ravel())
        users, user = np.unique(cells[:, 0], return_inverse=True)
        said = Said(user, cells[:, 1], mean, None if said.group is None else said.group[first])
        rng = np.random.default_rng(SEED)
        asked, held = hold_out(user, self.texts[said.pair], rng)
        chosen, *drawn = self.learn(said.select(asked), len(users), rng)
        pool, test = np.bincount(user[asked], minlength=len(users)), said.select(held)
        v, shared, others = self.v[test.pair], self.shared[new][first][held], self.majority[new][first][held]
        after = []
        for place, count in enumerate(ASKED):
            some = (pool >= count)[test.user]
            entry = {"answers": count, "people": int((pool >= count).sum()), "too few": int((pool < count).sum())}
            if some.any():
                some_said = test.select(some)

                def logits(coefficients, some=some, place=place):
                    return np.einsum("nd,nd->n", v[some], coefficients[place, test.user[some]])

                by_information = logits(chosen) if count else shared[some]
                entry[CHOSEN] = measure([by_information], shared[some], some_said)
                if count:
                    entry[RANDOM] = measure([logits(one) for one in drawn], shared[some], some_said)
            after.append(entry)
        neither = {"answers": len(user), "neither": int((~asked & ~held).sum())}
        return {"people": len(users), **neither, "after": after, MAJORITY: measure([others], shared, test)}

    def learn(self, said: Said, users: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Coefficients (C, U, D) after each number of answers: asked by information, and in DRAWS random orders."""
        prior, orders = Prior.of(self.coefficients), [None] + [rng] * DRAWS
        found = [np.empty((len(ASKED), users, self.v.shape[1])) for _ in orders]
        with progress("asking", users * len(orders), "people") as count:
            for start, stop in parts(np.bincount(said.user, minlength=users), USERS_AT_ONCE, CELLS_AT_ONCE):
                part = said.select((said.user >= start) & (said.user < stop))
                features, answers = pools(part.user - start, self.v[part.pair], part.preference, stop - start)
                for one, order in zip(found, orders):
                    one[:, start:stop] = coefficients_after(features, answers, prior, ASKED, order)
                    count(stop - start)
        return found


def measure(logits: list[np.ndarray], shared: np.ndarray, said: Said) -> dict:
    """Measures of all annotations together, of each preference group and of the one with the lowest accuracy.

    Args:
        logits: (N,) of each draw; measures are means over draws. shared: (N,) those of one reward for all; `change` is
            the difference to it, paired.
    """
    found: dict = {"all": measure_some(logits, shared, said)}
    if said.group is not None:
        groups = {}
        for name in sorted(set(said.group)):
            some = said.group == name
            groups[name] = measure_some([z[some] for z in logits], shared[some], said.select(some))
        ranked = [name for name in groups if groups[name]["accuracy"]["value"] is not None]
        found["groups"] = groups
        found["worst group"] = min(ranked, key=lambda name: groups[name]["accuracy"]["value"], default=None)
    return found


def measure_some(logits: list[np.ndarray], shared: np.ndarray, said: Said) -> dict:
    drawn, reference = [contributions(z, said.preference) for z in logits], contributions(shared, said.preference)
    found: dict = {"people": len(np.unique(said.user)), "answers": len(said.user)}
    for name in METRICS:
        x = np.mean([one[name] for one in drawn], 0)
        found[name] = number(mean_and_error(x, said.user)) | {"change": UNKNOWN}
        if not np.array_equal(logits[0], shared):  # that would be a comparison with itself
            found[name]["change"] = number(mean_and_error(x - reference[name], said.user))
    return found


def number(pair: tuple[float, float]) -> dict:
    return dict(zip(("value", "error"), map(finite, pair)))


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def notes(result: dict) -> list[str]:
    """What a reader of the numbers must know."""
    counts, known, new = result["counts"], result["known"], result["new"]
    found = []
    if known is None:
        found.append("the model knows nobody in these data: only new people are evaluated")
    elif known[OWN]["all"]["people"] == 1:
        found.append("no standard error for one person alone: it needs two people or more")
    if counts["ties"] == counts["answers"]:
        found.append("accuracy and AUC need answers that prefer one of two, got only ties")
    alone: Counter[str] = Counter()
    for part in (known and known[OWN], new and new["after"][0].get(CHOSEN)):
        alone.update(name for name, its in ((part or {}).get("groups") or {}).items() if its["people"] == 1)
    if alone:
        found.append(f"no standard error for a preference group of one person: {listed(alone)}")
    if new is not None:
        if few := [f"{at['too few']} for {at['answers']}" for at in new["after"] if at["too few"]]:
            found.append(f"new people with too few pairs to be asked, left out there: {', '.join(few)} answers")
        if new["neither"]:
            found.append(
                f"{new['neither']} of {new['answers']} answers of new people are left out: one text of their pair is "
                "held out, and the other is not"
            )
        if new["people"] == 1:
            found.append("no standard error for one new person alone: it needs two people or more")
    return found
