"""Which pair to ask a new user about next, and when to stop.

The belief about the user is N(mean, covariance) on the coefficients, see `posterior.py`. The next question is the pair
whose answer is expected to tell most about them.

Axes: P pairs, D base rewards.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.posterior import Posterior, Prior, mean_and_root

# Nodes and weights for expectations under N(0, 1). On sigmoids the trapezoidal rule is far better than Gauss-Hermite.
NODES = np.linspace(-4.5, 4.5, 32)
WEIGHTS = np.exp(-np.square(NODES) / 2) / np.exp(-np.square(NODES) / 2).sum()
ROWS = 1024  # of a pool at a time, so that their nodes stay in the cache
WIDEST = 150  # standard deviation of a logit; exp of the outermost node must be a number


class Answers(NamedTuple):
    """What is expected of the answers to pairs, all (P,): the chance of the first one, the entropy in nats, and an
    upper bound of `information`."""

    chance: np.ndarray
    entropy: np.ndarray
    bound: np.ndarray


def predict(features: np.ndarray, belief: Prior | Posterior) -> np.ndarray:
    """The probability (P,) that the user prefers the first answer of pairs with features (P, D), averaged over the
    belief: E sigmoid(v . lambda), as exact as `information`."""
    return _answers(*_pool(features, belief)[1:]).chance


def predictive_entropy(pool: np.ndarray, belief: Prior | Posterior) -> float:
    """How uncertain the next answers are: mean over the pool (P, D) of the entropy, in bits, of `predict`.

    It is 1 if nothing is known. It does not fall to 0: a user who finds two answers equally good stays a coin toss.
    """
    return _bits(_answers(*_pool(pool, belief)[1:]))


def enough(answers: int, entropy: float, questions: int | None = None, level: float | None = None) -> bool:
    """Whether to stop asking: after `questions` answers, or once the predictive entropy is below `level` bits.
    None turns a limit off."""
    return (questions is not None and answers >= questions) or (level is not None and entropy < level)


def next_question(pool: np.ndarray, belief: Prior | Posterior, asked: Sequence[int] = ()) -> tuple[int | None, float]:
    """The row of the pool to ask about next, None if all were asked; and `predictive_entropy`, at the cost of one.

    Args:
        pool: (P, D), v of each pair. asked: rows not to ask again.

    Raises:
        ValueError: features that do not fit the belief or are not finite.
    """
    pool, mean, variance = _pool(pool, belief)
    free = np.ones(len(pool), bool)
    free[list(asked)] = False
    answers = _answers(mean, variance)
    return _most_informative(mean, variance, free, answers) if free.any() else None, _bits(answers)


def _most_informative(mean: np.ndarray, variance: np.ndarray, free: np.ndarray, answers: Answers) -> int:
    """The first row among the `free` (P,) with the highest `information`. That is computed for those pairs only whose
    bound is not below what the pair with the highest bound has."""
    bound = np.where(free, answers.bound, -np.inf)
    highest = slice(bound.argmax(), bound.argmax() + 1)
    rows = np.flatnonzero(bound >= information(mean[highest], variance[highest]) - 1e-12)  # for rounding
    return int(rows[information(mean[rows], variance[rows]).argmax()])


def information(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How much the answer to a pair is expected to tell about the user: the mutual information, in nats, of answer and
    coefficients. It is the entropy of the answer minus the entropy that stays if the user is known:

        H(E sigmoid(z)) - E H(sigmoid(z)),    z ~ N(mean, variance), all (P,)

    The trapezoidal rule with 32 nodes is accurate to 1e-5 for standard deviations of z up to 5, to 2e-3 up to 10.
    """
    known = np.empty(len(mean))
    centre, deviation = _scaled(mean, variance)
    for start in range(0, len(mean), ROWS):
        rows = slice(start, start + ROWS)
        size = np.abs(np.multiply.outer(NODES, deviation[rows]) + centre[rows])
        small = np.exp(-size)
        known[rows] = WEIGHTS @ (np.log1p(small) + size * small / (1 + small))  # H(sigmoid(z))
    return np.maximum(_answers(mean, variance).entropy - known, 0)


def _answers(mean: np.ndarray, variance: np.ndarray) -> Answers:
    """For z ~ N(mean, variance), with t = tanh(z / 2): E sigmoid(z) = (1 + E t) / 2.

    H(s) >= ln 2 times 4 s (1 - s) = ln 2 (1 - t^2) for s = sigmoid(z), so H(E s) - ln 2 (1 - E t^2) is a bound.

    Nodes lie in pairs at m + b and m - b. With u = 1 / (cosh m + cosh b), a pair's t add up to 2 u sinh m, and its
    1 - t^2 to 4 (u cosh m - u^2 sinh^2 m). So a pair takes one exponential, and as long as half a node's tanh. All is
    times exp(-|m|), lest cosh m overflow.
    """
    centre, deviation = _scaled(mean, variance)
    shrunk = np.exp(-np.abs(centre))
    cosh, sinh = (1 + np.square(shrunk)) / 2, (1 - np.square(shrunk)) / 2
    mean_u, mean_square = np.empty(len(mean)), np.empty(len(mean))
    right, weights = NODES[len(NODES) // 2 :], WEIGHTS[len(NODES) // 2 :]
    for start in range(0, len(mean), ROWS):
        rows = slice(start, start + ROWS)
        u = np.multiply.outer(right, deviation[rows])
        np.exp(u, out=u)
        u += 1 / u
        u *= shrunk[rows] / 2
        u += cosh[rows]
        np.reciprocal(u, out=u)
        mean_u[rows] = weights @ u
        mean_square[rows] = weights @ np.square(u, out=u)
    chance = np.clip(0.5 + np.copysign(sinh * mean_u, centre), 0, 1)
    likely = np.clip(chance, np.finfo(float).tiny, 1 - np.finfo(float).epsneg)  # log(0) would be infinite
    entropy = -likely * np.log(likely) - (1 - likely) * np.log1p(-likely)
    uncertain = 4 * (cosh * mean_u - np.square(sinh) * mean_square)
    return Answers(chance, entropy, entropy - np.log(2) * uncertain)


def _scaled(mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (P,) of logits, those above WIDEST brought to it: there a user's answer is certain,
    and depends on the sign of the logit alone."""
    deviation = np.sqrt(variance)
    wider = np.maximum(deviation / WIDEST, 1)
    return mean / wider, deviation / wider


def _bits(answers: Answers) -> float:
    """The mean entropy, in bits."""
    return float(answers.entropy.mean() / np.log(2))


def _pool(pool: np.ndarray, belief: Prior | Posterior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pool (P, D), and mean and variance (P,) of each pair's logit."""
    pool = np.asarray(pool, np.float64)
    mean, root = mean_and_root(belief)
    if pool.ndim != 2 or pool.shape[1] != len(mean):
        raise ValueError(f"{len(mean)} base rewards need a pool of shape (P, {len(mean)}), got {pool.shape}")
    if not np.isfinite(pool).all():
        row = np.argmin(np.isfinite(pool).all(1))
        raise ValueError(f"the pool needs finite features, got {pool[row]} in row {row}")
    along = pool @ root
    return pool, pool @ mean, np.einsum("pd,pd->p", along, along)
