"""What is known of new users after so many of their real answers, asked in the order of `questions.py` or at random.

Users differ in what they have answered, so their pairs are padded with NaN: a user's questions are the known ones.

Axes: U users, M pairs of the user with the most, D base rewards, C numbers of answers.
"""

from collections.abc import Sequence

import numpy as np

from openrlhf_pgrpo.core.posterior import Prior, posteriors
from openrlhf_pgrpo.core.questions import information

TEST = 1 / 3  # of a user's pairs, held out to test what was learned from answers to the others


def hold_out(user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which annotations (N,) are held out: a third of each user's, rounded up, drawn at random. `user` (N,) are row
    numbers, and a user has one annotation for a pair."""
    order = np.lexsort((rng.random(len(user)), user))
    counts = np.bincount(user)
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place < np.ceil(TEST * counts - 1e-9)[user]


def pools(user: np.ndarray, v: np.ndarray, preference: np.ndarray, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (U, M, D) and answers (U, M) of what each user may be asked, padded; v (N, D), user (N,) sorted."""
    counts = np.bincount(user, minlength=users)
    column = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    features = np.zeros((users, counts.max(initial=0), v.shape[1]))
    answers = np.full(features.shape[:2], np.nan)
    features[user, column], answers[user, column] = v, preference
    return features, answers


def coefficients_after(
    features: np.ndarray,
    answers: np.ndarray,
    prior: Prior,
    counts: Sequence[int],
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The MAP coefficients (C, U, D) after `counts` (C,) answers; NaN where a user has fewer.

    Args:
        features (U, M, D), answers (U, M): as `pools` gives them.
        rng: asks in random order; None asks the pair with the most expected information next, as
            `questions.next_questions` does, whose sums these are for many users at once.

    Raises:
        ValueError: as `posteriors`.
    """
    users, size, rewards = features.shape
    known = ~np.isnan(answers)
    most = min(max(counts), size)
    order = np.zeros((users, most), np.int64)
    if rng is not None:
        order = np.where(known, rng.random(known.shape), np.inf).argsort(1)[:, :most]
    free, everyone = known.copy(), np.arange(users)
    found = np.full((len(counts), users, rewards), np.nan)
    for asked in range(most + 1):
        rows = order[:, :asked]
        said = np.where(known.sum(1, keepdims=True) >= asked, np.take_along_axis(answers, rows, 1), np.nan)
        if rng is None or asked in counts:
            mean, covariance = posteriors(np.take_along_axis(features, rows[..., None], 1), said, prior)
        for place in np.flatnonzero(np.asarray(counts) == asked):
            found[place] = np.where(known.sum(1, keepdims=True) >= asked, mean, np.nan)
        if rng is None and asked < most:
            z = np.einsum("umd,ud->um", features, mean)
            variance = np.einsum("umd,umd->um", features @ covariance, features)
            score = information(z.ravel(), np.maximum(variance, 0).ravel()).reshape(z.shape)
            order[:, asked] = np.where(free, score, -np.inf).argmax(1)
            free[everyone, order[:, asked]] = False
    return found
