"""A new user in about ten answers: prior, MAP and Laplace posterior, next question, when to stop (arXiv 2503.06358).

    p(y1 > y2 | user) = sigmoid(v . lambda)         v = phi(x, y1) - phi(x, y2), lambda the user's coefficients (Eq. 4)
    lambda* = argmin  sum_i BCE(answer_i, v_i . lambda) + 1/2 (lambda - m)' S^-1 (lambda - m)

The paper estimates lambda with an L2 penalty (Eq. 6). Ours is the mean m and the covariance S of the trained users'
coefficients, so that a new user starts as the average one. An answer is a number in [0, 1]: 1 for the first answer of
the pair, 0 for the second, 0.5 for a tie, and 1 - e where a share e of such answers is known to be wrong.

Everything is computed in z, lambda = m + L z with L L' = S: there the prior is N(0, I), whatever the scales of the
base rewards.

Axes: U users, P pairs, D base rewards, n answers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence

import numpy as np
from scipy.special import expit, xlog1py, xlogy

from openrlhf_pgrpo.core.files import write_whole

USERS_AT_ONCE = 2048  # that many users' answers stay in the processor's cache
TOLERANCE = 1e-8  # of a step; Newton's error is about its square
MOST_STEPS = 1000
LARGEST_LOGIT = 1e4  # of the average user, or a standard deviation among users
NODES = np.linspace(-4.5, 4.5, 32)  # of N(0, 1); the trapezoidal rule is far ahead of Gauss-Hermite's on sigmoids
WEIGHTS = np.exp(-np.square(NODES) / 2) / np.exp(-np.square(NODES) / 2).sum()


class Prior(NamedTuple):
    """What is known of a user before the first answer: N(mean (D,), covariance (D, D))."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, coefficients: np.ndarray) -> "Prior":
        """The prior from trained users' coefficients (U, D).

        The covariance is ((U - 1) C + D t I) / (U - 1 + D): their own, C, and as much as D users would say of a
        spread t that is equal in all directions. So it is regular for any number of users, and many outweigh it. t is
        the mean variance, trace(C) / D, but at least the mean square of the coefficients divided by U, without which
        users who all agree would tie a new one to themselves for ever.

        Raises:
            ValueError: no users, a number that is not finite, or only zeros.
        """
        coefficients = np.asarray(coefficients, np.float64)
        if coefficients.ndim != 2 or not coefficients.size:
            raise ValueError(f"a prior needs coefficients of shape (users, base rewards), got {coefficients.shape}")
        if not np.isfinite(coefficients).all():
            user = np.argmin(np.isfinite(coefficients).all(1))
            raise ValueError(f"a prior needs finite coefficients, got {coefficients[user]} of user {user}")
        users, rewards = coefficients.shape
        mean = coefficients.mean(0)
        scatter = (coefficients - mean).T @ (coefficients - mean)
        own = np.trace(scatter) / max(users - 1, 1) / rewards
        spread = max(own, np.square(coefficients).mean() / users)
        if spread == 0:
            raise ValueError("a prior needs coefficients other than 0, got only zeros: train the users first")
        return cls(mean, (scatter + rewards * spread * np.eye(rewards)) / (users - 1 + rewards))


class Posterior(NamedTuple):
    """What is known of a user after some answers: N(mean (D,), covariance (D, D)), Laplace's approximation."""

    mean: np.ndarray
    covariance: np.ndarray


def posterior(features: np.ndarray, answers: np.ndarray, prior: Prior) -> Posterior:
    """One user's MAP coefficients and the inverse of the exact Hessian there.

    Args:
        features: (n, D), v of each pair. answers: (n,) in [0, 1]. Without answers the result is the prior.

    Raises:
        ValueError: shapes that do not fit, a number that is not finite, an answer outside [0, 1], or a prior whose
            covariance is not positive definite.
    """
    answers = np.asarray(answers, np.float64)
    if np.isnan(answers).any():
        raise ValueError(f"a posterior needs answers from 0 to 1, got {answers}: leave out what was not answered")
    means, covariances = posteriors(np.asarray(features, np.float64)[None], answers[None], prior)
    return Posterior(means[0], covariances[0])


def posteriors(features: np.ndarray, answers: np.ndarray, prior: Prior) -> tuple[np.ndarray, np.ndarray]:
    """`posterior` of many users at once: means (U, D) and covariances (U, D, D).

    Newton's method with the exact Hessian, each step as long as it surely lowers the loss.

    Args:
        features: (U, n, D). answers: (U, n) in [0, 1], or NaN where a user did not answer; the features of these do
            not matter.

    Raises:
        ValueError: as `posterior`.
    """
    features, answers = np.asarray(features, np.float64), np.asarray(answers, np.float64)
    mean, root = _mean_and_root(prior)
    if features.ndim != 3 or features.shape != (*answers.shape, len(mean)):
        shapes = f"{features.shape} and {answers.shape}"
        raise ValueError(f"{len(mean)} base rewards need features (U, n, {len(mean)}) and answers (U, n), got {shapes}")
    users = len(features)
    means, covariances = np.empty((users, len(mean))), np.empty((users, len(mean), len(mean)))
    for start in range(0, users, USERS_AT_ONCE):
        part = slice(start, start + USERS_AT_ONCE)
        asked = ~np.isnan(answers[part])
        answered = np.where(asked, answers[part], 0.5)
        used = np.where(asked[..., None], features[part], 0.0)  # a pair of features 0 pulls nowhere
        _check_answers(used, answered, start)
        design, offset = used @ root, used @ mean
        largest = max(np.abs(design).max(initial=0), np.abs(offset).max(initial=0))
        if largest > LARGEST_LOGIT:
            raise ValueError(f"a posterior needs logits up to {LARGEST_LOGIT:g}, got {largest:g}: rescale the features")
        z, spread = _maximum(design, offset, answered)
        means[part] = mean + z @ root.T
        covariances[part] = root @ spread @ root.T
    return means, (covariances + covariances.swapaxes(1, 2)) / 2


def _mean_and_root(normal: Prior | Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and Cholesky factor (D, D) of the covariance, both checked."""
    mean, covariance = (np.asarray(part, np.float64) for part in normal)
    kind = type(normal).__name__.lower()
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"a {kind} needs a mean (D,) and a covariance (D, D), got {mean.shape}, {covariance.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"a {kind} needs finite numbers, got mean {mean} and covariance {covariance.tolist()}")
    try:
        return mean, np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        least = np.linalg.eigvalsh(covariance)[0]
        raise ValueError(f"a {kind} needs a positive definite covariance, got an eigenvalue of {least:g}") from None


def _check_answers(features: np.ndarray, answers: np.ndarray, first_user: int) -> None:
    needs = {
        "finite features": (features, np.isfinite(features).all(-1)),
        "answers from 0 to 1": (answers, (answers >= 0) & (answers <= 1)),
    }
    for need, (values, good) in needs.items():
        if not good.all():
            user, answer = np.argwhere(~good)[0]
            got = f"{values[user, answer]} as answer {answer} of user {first_user + user}"
            raise ValueError(f"a posterior needs {need}, got {got}")


def _maximum(design: np.ndarray, offset: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MAP z (U, D) and the inverse Hessian (U, D, D) for logits offset (U, n) + design (U, n, D) z."""
    z = np.zeros((len(design), design.shape[2]))
    moving = np.arange(len(z))
    for _ in range(MOST_STEPS):
        rows, at, wanted = design[moving], z[moving], answers[moving]
        logits = offset[moving] + (rows @ at[..., None])[..., 0]
        pull = np.einsum("un,und->ud", wanted - expit(logits), rows) - at
        step = np.linalg.solve(_hessian(rows, logits), pull[..., None])[..., 0]
        turn = (rows @ step[..., None])[..., 0]  # of the logits
        z[moving] += _lengths(logits, turn, wanted, at, step, pull)[:, None] * step
        moving = moving[np.maximum(np.abs(turn).max(1, initial=0), np.abs(step).max(1)) > TOLERANCE]
        if not len(moving):
            return z, np.linalg.inv(_hessian(design, offset + (design @ z[..., None])[..., 0]))
    raise ArithmeticError(f"Newton's method found no end in {MOST_STEPS} steps, at steps of {np.abs(step).max():g}")


def _hessian(design: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Of the loss, (U, D, D)."""
    return np.eye(design.shape[2]) + design.swapaxes(1, 2) @ (design * _slope(logits)[..., None])


def _lengths(logits, turn, answers, z, step, pull) -> np.ndarray:
    """How much of each user's step to take, (U,); the arguments are (U, n) and (U, D).

    Along a step that turns no logit by more than r, the curvature grows at most like exp(r t), as |s''| <= s' for s'
    the slope of the sigmoid; so log(1 + r) / r of it surely lowers the loss. That is nearly all of a short step; of a
    long one, all, a half, a quarter ... is tried first.
    """
    reach = np.abs(turn).max(1, initial=0)
    length = np.divide(np.log1p(reach), reach, out=np.ones_like(reach), where=reach > 0)
    (far,) = np.nonzero(reach > 1)
    if len(far):
        logits, turn, answers, z, step = logits[far], turn[far], answers[far], z[far], step[far]
        safe, descent = length[far], (pull[far] * step).sum(1)

        def loss(part):
            at = logits + part[:, None] * turn
            return (np.logaddexp(0, at) - answers * at).sum(1) + np.square(z + part[:, None] * step).sum(1) / 2

        tried, before = np.ones(len(far)), loss(np.zeros(len(far)))
        while len(long := np.flatnonzero((tried > safe) & (loss(tried) > before - descent * tried / 4))):
            tried[long] = np.maximum(tried[long] / 2, safe[long])
        length[far] = tried
    return length


def log_evidence(features: np.ndarray, answers: np.ndarray, prior: Prior) -> float:
    """log of the chance that a user of this prior gives these answers, by Laplace's approximation:

        -loss at the MAP + 1/2 log det(posterior covariance) - 1/2 log det(prior covariance)

    Args and errors as `posterior`.
    """
    features, answers = np.asarray(features, np.float64), np.asarray(answers, np.float64)
    found = posterior(features, answers, prior)
    logits, off = features @ found.mean, np.linalg.solve(np.linalg.cholesky(prior.covariance), found.mean - prior.mean)
    loss = (np.logaddexp(0, logits) - answers * logits).sum() + np.square(off).sum() / 2
    volumes = [np.linalg.slogdet(belief.covariance)[1] for belief in (found, prior)]
    return float((volumes[0] - volumes[1]) / 2 - loss)


# --- the next question -----------------------------------------------------------------------------------------------


def predict(features: np.ndarray, belief: Prior | Posterior) -> np.ndarray:
    """The chance (P,) that the user prefers the first answer of pairs with features (P, D), averaged over what is
    not known of the user: E sigmoid(v . lambda), as exact as `information`."""
    return _chance(*_pool(features, belief)[1:])


def predictive_entropy(pool: np.ndarray, belief: Prior | Posterior) -> float:
    """How uncertain the next answers are: mean over the pool (P, D) of the entropy, in bits, of `predict`.

    1 if nothing at all is known, and not 0 in the end: a user who finds two answers equally good stays a coin toss.
    """
    return float(_entropy(predict(pool, belief)).mean() / np.log(2))


def enough(answers: int, entropy: float, questions: Optional[int] = None, level: Optional[float] = None) -> bool:
    """Whether to stop asking: after so many `questions`, or once the predictive entropy is below a `level` in bits;
    None switches either off."""
    return (questions is not None and answers >= questions) or (level is not None and entropy < level)


def next_questions(
    pool: np.ndarray,
    belief: Prior | Posterior,
    asked: Sequence[int] = (),
    rule: str = "information",
    count: int = 1,
    rng: Optional[np.random.Generator] = None,
) -> np.ndarray:
    """The rows (count,) of the pool to ask about next, best first.

    Several are chosen one after the other, each as if those before it had been answered as expected: the mean stays,
    and the covariance shrinks by the rank-one update of Laplace's approximation. So two pairs that ask the same come
    one and not both.

    Args:
        pool: (P, D), v of each pair. asked: rows not to ask again. rule: one of `RULES`, or random.
        rng: where random takes its numbers from; needed by it alone.

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
    if rule not in RULES:
        raise ValueError(f"the next question needs a rule of {', '.join((*RULES, 'random'))}, got {rule!r}")
    score, chosen, covariance = RULES[rule], [], np.asarray(belief.covariance, np.float64)
    while True:
        chosen.append(int(np.where(free, score(mean, variance), -np.inf).argmax()))
        if len(chosen) == count:
            return np.array(chosen)
        best = chosen[-1]
        free[best] = False
        along = covariance @ pool[best]
        shrink = _slope(mean[best]) / (1 + _slope(mean[best]) * variance[best])
        covariance = covariance - shrink * np.outer(along, along)
        variance = variance - shrink * np.square(pool @ along)


def information(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """What the answer to a pair is expected to tell about the user: the mutual information, in nats, of answer and
    coefficients. It is the entropy of the answer, less the part that would stay if the user were known:

        H(E sigmoid(z)) - E H(sigmoid(z)),    z ~ N(mean, variance), all (P,)

    by the trapezoidal rule with 32 nodes: to 1e-5 for standard deviations of z up to 5, to 2e-3 up to 10.
    """
    return np.maximum(_entropy(_chance(mean, variance)) - _expect(_answer_entropy, mean, variance), 0)


def released(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """s'(v.lambda)^2 v'M^-1 v, the variance of the predicted chance by the delta method, as in the released code of
    arXiv 2503.06358. M is there 0.001 I plus the sum of s' v v' over the answers, so Prior(0, 1000 I) is its prior."""
    return np.square(_slope(mean)) * variance


def d_optimal(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """s'(v.lambda) v'M^-1 v, which orders pairs as the determinant of M after the answer does."""
    return _slope(mean) * variance


RULES = {rule.__name__: rule for rule in (information, released, d_optimal)}


def _pool(pool: np.ndarray, belief: Prior | Posterior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pool (P, D), and mean and variance (P,) of each pair's logit."""
    pool = np.asarray(pool, np.float64)
    mean, root = _mean_and_root(belief)
    if pool.ndim != 2 or pool.shape[1] != len(mean):
        raise ValueError(f"{len(mean)} base rewards need a pool of shape (P, {len(mean)}), got {pool.shape}")
    if not np.isfinite(pool).all():
        row = np.argmin(np.isfinite(pool).all(1))
        raise ValueError(f"the pool needs finite features, got {pool[row]} in row {row}")
    return pool, pool @ mean, np.square(pool @ root).sum(1)


def _expect(value: Callable, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E value(z), (P,), for z ~ N(mean, variance); node by node, to stay in the cache."""
    total, deviation = np.zeros(len(mean)), np.sqrt(variance)
    for node, weight in zip(NODES, WEIGHTS):
        total += weight * value(mean + node * deviation)
    return total


def _chance(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """E sigmoid(z), (P,); by tanh, which numpy has four times as fast."""
    return np.clip(0.5 + 0.5 * _expect(lambda z: np.tanh(0.5 * z), mean, variance), 0, 1)


def _answer_entropy(logits: np.ndarray) -> np.ndarray:
    """Of an answer, in nats, from its logit."""
    size = np.abs(logits)
    small = np.exp(-size)
    return np.log1p(small) + size * small / (1 + small)


def _entropy(chance: np.ndarray) -> np.ndarray:
    """Of a yes with that chance, in nats."""
    return -xlogy(chance, chance) - xlog1py(1 - chance, -chance)


def _slope(logits: np.ndarray) -> np.ndarray:
    """s', the derivative of the sigmoid."""
    chance = expit(logits)
    return chance * (1 - chance)


# --- the file of a user ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a user said to a pair: its name, which the asking side chooses, its features (D,), and the answer."""

    pair: str
    features: tuple[float, ...]
    preference: float


@dataclass(frozen=True)
class Profile:
    """All that is kept of a user who was asked: a small JSON file, exact to the bit after `load`.

    fingerprint is that of the model whose base rewards the features are: coefficients mean nothing under another.
    The features stand in it so that a user can be fitted again, with a better prior, without the pairs.
    """

    user: str
    fingerprint: str
    coefficients: np.ndarray
    covariance: np.ndarray
    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, user: str, fingerprint: str, answers: Sequence[Answer], prior: Prior) -> "Profile":
        """The profile that follows from the answers.

        Raises:
            ValueError: as `posterior`.
        """
        features = [answer.features for answer in answers] or np.empty((0, len(prior.mean)))
        fitted = posterior(features, [answer.preference for answer in answers], prior)
        return cls(user, fingerprint, *fitted, tuple(answers))

    @property
    def posterior(self) -> Posterior:
        return Posterior(self.coefficients, self.covariance)

    def save(self, path: Path) -> None:
        """Writes the file; when this returns, it is on the disk."""
        content = {
            "user": self.user,
            "fingerprint": self.fingerprint,
            "coefficients": self.coefficients.tolist(),
            "covariance": self.covariance.tolist(),
            "answers": [asdict(answer) for answer in self.answers],
        }
        write_whole(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Profile":
        """The profile in a file, made for the model with that fingerprint.

        Raises:
            ValueError: a file that is truncated or no profile, or one that was made for another model.
            OSError: it cannot be read.
        """
        path = Path(path)
        try:
            profile = cls._from(json.loads(path.read_bytes()))
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} needs to be a whole profile, got {error}: restore it or ask again") from error
        if profile.fingerprint != fingerprint:
            raise ValueError(
                f"{path} needs to be a profile for the model {fingerprint}, got one for {profile.fingerprint}: "
                "coefficients mean nothing under another model; ask again, or use that one"
            )
        return profile

    @classmethod
    def _from(cls, content) -> "Profile":
        content = _record(content, "a profile", ("user", "fingerprint", "coefficients", "covariance", "answers"))
        for key, kind in (("user", str), ("fingerprint", str), ("answers", list)):
            if not isinstance(content[key], kind):
                raise ValueError(f"{content[key]!r} as {key}")
        fitted = Posterior(_numbers(content["coefficients"]), _numbers(content["covariance"]))
        _mean_and_root(fitted)
        answers = []
        for number, row in enumerate(content["answers"]):
            row = _record(row, f"answer {number}", ("pair", "features", "preference"))
            if not isinstance(row["pair"], str):
                raise ValueError(f"{row['pair']!r} as pair of answer {number}")
            features, preference = _numbers(row["features"]), _numbers(row["preference"])
            if preference.shape:
                raise ValueError(f"{row['preference']!r} as preference of answer {number}")
            if features.shape != fitted.mean.shape or not 0 <= preference <= 1:
                raise ValueError(f"features of shape {features.shape} and preference {preference} as answer {number}")
            answers.append(Answer(row["pair"], tuple(features.tolist()), float(preference)))
        return cls(content["user"], content["fingerprint"], *fitted, tuple(answers))


def _record(content, name: str, keys: tuple[str, ...]) -> dict:
    if not isinstance(content, dict) or set(content) != set(keys):
        found = f"the keys {sorted(content)}" if isinstance(content, dict) else f"{type(content).__name__}"
        raise ValueError(f"{found} for {name}, which has {', '.join(keys)}")
    return content


def _numbers(values) -> np.ndarray:
    """A number, or nested lists of numbers of one shape, as they stand in JSON."""
    array = np.array(values)
    if array.dtype.kind not in "if" or not np.isfinite(array).all():
        raise ValueError(f"{str(values)[:80]} instead of finite numbers")
    return array.astype(np.float64)
