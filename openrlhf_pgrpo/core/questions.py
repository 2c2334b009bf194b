"""Which pair to ask a new user about next, and when to stop.

The belief about the user is N(mean, covariance) on the coefficients, see `posterior.py`. The next question is the pair
whose answer is expected to tell most about them.

Axes: P pairs, D base rewards.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import xlog1py, xlogy

from openrlhf_pgrpo.core.posterior import Posterior, Prior, mean_and_root, slope

# Nodes and weights for expectations under N(0, 1). On sigmoids the trapezoidal rule is far better than Gauss-Hermite.
NODES = np.linspace(-4.5, 4.5, 32)
WEIGHTS = np.exp(-np.square(NODES) / 2) / np.exp(-np.square(NODES) / 2).sum()


def predict(features: np.ndarray, belief: Prior | Posterior) -> np.ndarray:
    """The probability (P,) that the user prefers the first answer of pairs with features (P, D), averaged over the
    belief: E sigmoid(v . lambda), as exact as `information`."""
    return _chance(*_pool(features, belief)[1:])


def predictive_entropy(pool: np.ndarray, belief: Prior | Posterior) -> float:
    """How uncertain the next answers are: mean over the pool (P, D) of the entropy, in bits, of `predict`.

    It is 1 if nothing is known. It does not fall to 0: a user who finds two answers equally good stays a coin toss.
    """
    return float(_entropy(predict(pool, belief)).mean() / np.log(2))


def enough(answers: int, entropy: float, questions: int | None = None, level: float | None = None) -> bool:
    """Whether to stop asking: after `questions` answers, or once the predictive entropy is below `level` bits.
    None turns a limit off."""
    return (questions is not None and answers >= questions) or (level is not None and entropy < level)


def next_questions(
    pool: np.ndarray,
    belief: Prior | Posterior,
    asked: Sequence[int] = (),
    rule: str | Callable[[np.ndarray, np.ndarray], np.ndarray] = "information",
    count: int = 1,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The rows (count,) of the pool to ask about next, best first.

    Several are chosen one after the other, each as if those before it had been answered as expected: the mean stays,
    and the covariance shrinks by the rank-one update of Laplace's approximation. So near-duplicate questions are not
    both chosen.

    Args:
        pool: (P, D), v of each pair. asked: rows not to ask again.
        rule: "information"; "random"; or a function that scores pairs by mean and variance (P,) of their logits, and
            the pair with the highest score is next.
        rng: the generator for the rule random, which alone needs it.

    Raises:
        ValueError: an unknown rule, random without `rng`, fewer than `count` rows left, or features that do not fit
            the belief or are not finite.
    """
    pool, mean, variance = _pool(pool, belief)
    free = np.ones(len(pool), bool)
    free[list(asked)] = False
    if not 1 <= count <= free.sum():
        raise ValueError(f"the pool of {len(pool)} pairs needs {count} that were not asked yet, got {free.sum()}")
    if rule == "random":
        if rng is None:
            raise ValueError("the rule random needs rng, a numpy.random.Generator, got None")
        return rng.choice(np.flatnonzero(free), count, replace=False)
    if rule == "information":
        score: Callable[[np.ndarray, np.ndarray], np.ndarray] = information
    elif callable(rule):
        score = rule
    else:
        raise ValueError(f"the next question needs the rule information, random or a function, got {rule!r}")
    chosen: list[int] = []
    covariance = np.asarray(belief.covariance, np.float64)
    while True:
        chosen.append(int(np.where(free, score(mean, variance), -np.inf).argmax()))
        if len(chosen) == count:
            return np.array(chosen)
        best = chosen[-1]
        free[best] = False
        along = covariance @ pool[best]
        shrink = slope(mean[best]) / (1 + slope(mean[best]) * variance[best])
        covariance = covariance - shrink * np.outer(along, along)
        variance = variance - shrink * np.square(pool @ along)


def information(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How much the answer to a pair is expected to tell about the user: the mutual information, in nats, of answer and
    coefficients. It is the entropy of the answer minus the entropy that stays if the user is known:

        H(E sigmoid(z)) - E H(sigmoid(z)),    z ~ N(mean, variance), all (P,)

    The trapezoidal rule with 32 nodes is accurate to 1e-5 for standard deviations of z up to 5, to 2e-3 up to 10.
    """
    return np.maximum(_entropy(_chance(mean, variance)) - _expect(_answer_entropy, mean, variance), 0)


def _pool(pool: np.ndarray, belief: Prior | Posterior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pool (P, D), and mean and variance (P,) of each pair's logit."""
    pool = np.asarray(pool, np.float64)
    mean, root = mean_and_root(belief)
    if pool.ndim != 2 or pool.shape[1] != len(mean):
        raise ValueError(f"{len(mean)} base rewards need a pool of shape (P, {len(mean)}), got {pool.shape}")
    if not np.isfinite(pool).all():
        row = np.argmin(np.isfinite(pool).all(1))
        raise ValueError(f"the pool needs finite features, got {pool[row]} in row {row}")
    return pool, pool @ mean, np.square(pool @ root).sum(1)


def _expect(value: Callable, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E value(z), (P,), for z ~ N(mean, variance). Node by node, so that the numbers stay in the cache."""
    total, deviation = np.zeros(len(mean)), np.sqrt(variance)
    for node, weight in zip(NODES, WEIGHTS):
        total += weight * value(mean + node * deviation)
    return total


def _chance(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E sigmoid(z), (P,). By tanh, which is four times as fast in numpy."""
    return np.clip(0.5 + 0.5 * _expect(lambda z: np.tanh(0.5 * z), mean, variance), 0, 1)


def _answer_entropy(logits: np.ndarray) -> np.ndarray:
    """The entropy, in nats, of an answer with this logit."""
    size = np.abs(logits)
    small = np.exp(-size)
    return np.log1p(small) + size * small / (1 + small)


def _entropy(chance: np.ndarray) -> np.ndarray:
    """The entropy, in nats, of an answer that is yes with this probability."""
    return -xlogy(chance, chance) - xlog1py(1 - chance, -chance)
