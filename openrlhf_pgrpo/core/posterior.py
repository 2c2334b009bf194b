"""A new user in about ten answers: prior, MAP and Laplace posterior, evidence (arXiv 2503.06358).

    p(y1 > y2 | user) = sigmoid(v . lambda)         v = phi(x, y1) - phi(x, y2), lambda the user's coefficients (Eq. 4)
    lambda* = argmin  sum_i BCE(answer_i, v_i . lambda) + 1/2 (lambda - m)' S^-1 (lambda - m)

The paper estimates lambda with an L2 penalty (Eq. 6). Here m and S are the mean and covariance of the trained users'
coefficients, so a new user starts as the average one. An answer is a number in [0, 1]: 1 for the first answer of the
pair, 0 for the second, 0.5 for a tie, and 1 - e where a share e of such answers is known to be wrong.

Everything is computed in z, where lambda = m + L z and L L' = S. In z the prior is N(0, I), whatever the scales of the
base rewards.

Axes: U users, P pairs, D base rewards, n answers.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

USERS_AT_ONCE = 2048  # their answers fit into the processor's cache
TOLERANCE = 1e-8  # of a step; Newton's error is about its square
MOST_STEPS = 1000
LARGEST_LOGIT = 1e4  # for the average user, and for one standard deviation among users


class Prior(NamedTuple):
    """The belief about a user before the first answer: N(mean (D,), covariance (D, D))."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, coefficients: np.ndarray) -> "Prior":
        """The prior from trained users' coefficients (U, D).

        The covariance is ((U - 1) C + D t I) / (U - 1 + D). It mixes the users' own covariance C with a spread t that
        is equal in all directions and counts as much as D users. So it is regular for any number of users, and many
        users outweigh t. t is the mean variance, trace(C) / D, but at least the mean square of the coefficients
        divided by U. Without this minimum, users who all agree would leave a new user no freedom.

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
    """The belief about a user after some answers: N(mean (D,), covariance (D, D)), Laplace's approximation."""

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

    Newton's method with the exact Hessian. The length of each step makes sure that it lowers the loss.

    Args:
        features: (U, n, D). answers: (U, n) in [0, 1], or NaN where a user did not answer; features do not matter
            there.

    Raises:
        ValueError: as `posterior`.
    """
    features, answers = np.asarray(features, np.float64), np.asarray(answers, np.float64)
    mean, root = mean_and_root(prior)
    if features.ndim != 3 or features.shape != (*answers.shape, len(mean)):
        need = f"{len(mean)} base rewards need features (U, n, {len(mean)}) and answers (U, n)"
        raise ValueError(f"{need}, got {features.shape} and {answers.shape}")
    users = len(features)
    means, covariances = np.empty((users, len(mean))), np.empty((users, len(mean), len(mean)))
    for start in range(0, users, USERS_AT_ONCE):
        part = slice(start, start + USERS_AT_ONCE)
        asked = ~np.isnan(answers[part])
        answered = np.where(asked, answers[part], 0.5)
        used = np.where(asked[..., None], features[part], 0.0)  # features of 0 have no effect
        _check_answers(used, answered, start)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused in the next lines
            design, offset = used @ root, used @ mean
        largest = np.max([np.abs(design).max(initial=0), np.abs(offset).max(initial=0)])
        if not largest <= LARGEST_LOGIT:  # nan is not, either
            raise ValueError(f"a posterior needs logits up to {LARGEST_LOGIT:g}, got {largest:g}: rescale features")
        z, spread = _maximum(design, offset, answered)
        means[part] = mean + z @ root.T
        covariances[part] = root @ spread @ root.T
    return means, (covariances + covariances.swapaxes(1, 2)) / 2


def mean_and_root(normal: Prior | Posterior) -> tuple[np.ndarray, np.ndarray]:
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
    """MAP z (U, D) and the inverse Hessian (U, D, D), where the logits are offset (U, n) + design (U, n, D) z."""
    z = np.zeros((len(design), design.shape[2]))
    moving = np.arange(len(z))
    for _ in range(MOST_STEPS):
        rows, at, wanted = design[moving], z[moving], answers[moving]
        logits = offset[moving] + (rows @ at[..., None])[..., 0]
        pull = np.einsum("un,und->ud", wanted - expit(logits), rows) - at
        step = np.linalg.solve(_hessian(rows, logits), pull[..., None])[..., 0]
        turn = (rows @ step[..., None])[..., 0]  # change of the logits
        z[moving] += _step_fractions(logits, turn, wanted, at, step, pull)[:, None] * step
        moving = moving[np.maximum(np.abs(turn).max(1, initial=0), np.abs(step).max(1)) > TOLERANCE]
        if not len(moving):
            return z, np.linalg.inv(_hessian(design, offset + (design @ z[..., None])[..., 0]))
    raise ArithmeticError(f"Newton's method did not converge in {MOST_STEPS} steps, last step {np.abs(step).max():g}")


def _hessian(design: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """The Hessian (U, D, D) of the loss."""
    return np.eye(design.shape[2]) + design.swapaxes(1, 2) @ (design * slope(logits)[..., None])


def _step_fractions(logits, turn, answers, z, step, pull) -> np.ndarray:
    """The part (U,) of the step that each user takes; the arguments are (U, n) and (U, D).

    If a step changes no logit by more than r, the curvature along it grows at most like exp(r t), because |s''| <= s'
    for the slope s' of the sigmoid. So log(1 + r) / r of the step is sure to lower the loss. This is nearly all of a
    short step. For a long step, all, a half, a quarter ... of it are tried first.
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
    """log of the probability that a user of this prior gives these answers, by Laplace's approximation:

        -loss at the MAP + 1/2 log det(posterior covariance) - 1/2 log det(prior covariance)

    Args and errors as `posterior`.
    """
    features, answers = np.asarray(features, np.float64), np.asarray(answers, np.float64)
    found = posterior(features, answers, prior)
    logits, off = features @ found.mean, np.linalg.solve(np.linalg.cholesky(prior.covariance), found.mean - prior.mean)
    loss = (np.logaddexp(0, logits) - answers * logits).sum() + np.square(off).sum() / 2
    volumes = [np.linalg.slogdet(belief.covariance)[1] for belief in (found, prior)]
    return float((volumes[0] - volumes[1]) / 2 - loss)


def slope(logits: np.ndarray) -> np.ndarray:
    """s', the derivative of the sigmoid."""
    chance = expit(logits)
    return chance * (1 - chance)
