"""How many base rewards the data support, and with which penalty, by cross-validation.

Axes: P pairs, N annotations, F numbers of base rewards, K folds.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.factorization import check_overlap, start
from openrlhf_pgrpo.core.optimum import Problem, cross_entropy, logits, minimum, strongest

Fit = tuple[int, int, int]  # which number of base rewards, which penalty, which fold
NOTHING = 1e-6  # A smaller difference of log losses is none.
FOLDS = 5


class Choice(NamedTuple):
    """A cross-validated curve over numbers of base rewards, and the number that it recommends.

    Attributes:
        factors: (F,) numbers of base rewards. loss, error: (F,) held-out log loss per annotation, and its standard
            error over folds. l2s: (F,) the best penalty for each number.
        recommended: D. l2: its penalty.
    """

    factors: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    l2s: np.ndarray
    recommended: int
    l2: float

    def __str__(self) -> str:
        rows = zip(self.factors, self.loss, self.error, self.l2s)
        marks = {self.recommended: "  <- recommended: the fewest within one standard error of the best"}
        lines = [f"{d:12} {loss:9.4f} ±{error:.4f} {l2:6g}{marks.get(d, '')}" for d, loss, error, l2 in rows]
        return "\n".join([f"{'base rewards':>12} {'held-out log loss':>17} {'l2':>6}", *lines])


def choose_factors(
    X,
    annotations: Annotations,
    factors: Sequence[int] = tuple(range(1, 9)),
    l2: Sequence[float] = (1.0, 3.0, 10.0, 30.0),
    folds: int = FOLDS,
    seed: int = 0,
    together: np.ndarray | None = None,
    along: Callable[[Sequence[Fit]], Iterable[Fit]] = iter,
) -> Choice:
    """How many base rewards predict held-out annotations best, each number with its own best penalty.

    From the highest penalty on, lower ones are tried until the loss has risen by more than the standard error of the
    difference. From the largest number of base rewards on, each fit starts from the strongest ones of the fit before
    with the same penalty.

    Each user's annotations are dealt evenly to the folds, and those of one pair go to the same fold. The only pair of
    a user is never held out. The seed decides how they are dealt, and nothing else. The recommended D is the smallest
    one whose loss is within one standard error of the least.

    Args:
        together: (P,) what some pairs have in common, such as the number of their prompt. Such pairs go to the same
            fold. Or (P, 2), what either side of a pair has in common with others, such as the number of the answer: a
            fold holds out pairs of two such numbers, and trains on those of none; the rest it leaves out. A user whom
            a fold would leave without training pairs keeps all for training.
            Without `together`, training pairs contain texts of the held-out pairs. The chosen penalty is too low for
            new texts then; and whoever says A > B and B > C of ratings also says A > C, so that even noise is
            predicted. For items known by number there is no other way: nothing is known of a new one.
        along: gives the fits one after the other in their order, such as with a progress bar.

    Raises:
        ValueError: as `fit`; fewer than 2 folds, or nothing to hold out.
    """
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {folds}")
    check_overlap(X, annotations)
    training, held_out = parted(annotations, folds, seed, together)
    if not held_out.any(1).all():
        raise ValueError(
            f"cross-validation in {folds} folds needs something to hold out in each, got too few pairs or users with "
            f"several ({len(annotations)} answers of {len(annotations.users)} users): ask more, or choose the number "
            "of base rewards and their penalty l2 yourself"
        )
    columns = annotations.user, annotations.pair, annotations.preference
    losses = np.full((len(factors), len(l2), folds), np.inf)
    whole = Problem.of(X, annotations)
    parts = [annotations.select(rows) for rows in training]
    problems = [whole.of_others(part) for part in parts]
    firsts = [start(problem, part, max(factors)) for problem, part in zip(problems, parts)]
    near = {(j, k): firsts[k] for j, k in product(range(len(l2)), range(folds))}
    descending = [np.argsort(values)[::-1].tolist() for values in (factors, l2)]
    for i, j, k in along([*product(*descending, range(folds))]):
        before = [losses[i, other] for other in descending[1][: descending[1].index(j)]]
        if len(before) > 1 and risen(*before[-2:]):
            continue
        near[j, k] = head, coefficients = minimum(problems[k], *strongest(*near[j, k], factors[i]), l2[j])
        user, pair, preference = (column[held_out[k]] for column in columns)  # not of every user
        z = logits(whole.X @ head.T, coefficients, pair, user)
        losses[i, j, k] = cross_entropy(z, preference) / len(user)
    best = losses.mean(2).argmin(1)
    curve = losses[np.arange(len(factors)), best]
    mean, error = curve.mean(1), curve.std(1, ddof=1) / np.sqrt(folds)
    least = mean.argmin()
    good = [i for i in range(len(factors)) if mean[i] <= mean[least] + error[least]]
    chosen = min(good, key=lambda i: factors[i])
    l2s = np.asarray(l2, np.float64)[best]
    return Choice(np.asarray(factors), mean, error, l2s, int(factors[chosen]), float(l2s[chosen]))


def risen(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a loss (K,) over folds is above the one before by more than the standard error of the difference."""
    if np.isinf(after).any():  # because it had risen before
        return True
    difference = after - before
    return difference.mean() > NOTHING + difference.std(ddof=1) / np.sqrt(len(difference))


def least_held_out(annotations: Annotations, together: np.ndarray, folds: int = FOLDS, seed: int = 0) -> int:
    """How many annotations `choose_factors` holds out in its smallest fold."""
    return int(parted(annotations, folds, seed, together)[1].sum(1).min())


def parted(
    annotations: Annotations, folds: int, seed: int, together: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which annotations each fold trains on, (K, N), and which it holds out (K, N); some are neither."""
    rng = np.random.default_rng(seed)
    fold = deal(annotations, folds, rng) if together is None else deal_together(annotations, together, folds, rng)
    held = fold.reshape(len(annotations), -1) == np.arange(folds)[:, None, None]
    return ~held.any(2), held.all(2)


def deal(annotations: Annotations, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (N,) of each annotation; -1 where a user has a single pair, which stays in training."""
    cells = np.stack([annotations.user, annotations.pair], 1)
    cells, cell = np.unique(cells, axis=0, return_inverse=True)
    order = np.lexsort((rng.random(len(cells)), cells[:, 0]))
    counts = np.bincount(cells[:, 0])
    starts = np.cumsum(counts) - counts
    first = rng.integers(folds, size=len(counts))  # else users with few pairs would fill only the first folds
    fold = np.empty(len(cells), np.int64)
    fold[order] = (np.arange(len(cells)) - np.repeat(starts, counts) + np.repeat(first, counts)) % folds
    fold[np.repeat(counts == 1, counts)] = -1
    return fold[cell.ravel()]


def deal_together(annotations: Annotations, together: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (N, 1) of each annotation, the same for all pairs with the same value in `together` (P,); or the folds
    (N, 2) of both values in `together` (P, 2).

    They are -1 where a fold would leave a user without training pairs: these all stay in training.
    """
    # `np.unique` of texts would give each as much memory as the longest needs.
    values = {value: row for row, value in enumerate(sorted(set(together.ravel().tolist())))}
    value = np.array([values[value] for value in together.ravel().tolist()]).reshape(len(together), -1)
    fold = (rng.permutation(len(values)) % folds)[value][annotations.pair]
    users = len(annotations.users)
    left = [np.bincount(annotations.user, (fold != k).all(1), users) for k in range(folds)]
    stays = np.min(left, 0) == 0
    return np.where(stays[annotations.user, None], -1, fold)
