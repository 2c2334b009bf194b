"""What is known of new users after so many of their real answers, asked in the order of `questions.py` or at random.

Users differ in what they have answered, so their pairs are padded with NaN: a user's questions are the known ones.

Axes: U users, N annotations, M pairs of the user with the most, D base rewards, C numbers of answers.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from openrlhf_pgrpo.core.posterior import Prior, posteriors
from openrlhf_pgrpo.core.questions import information

TEST = 1 / 3  # of a user's texts: their pairs test what was learned from answers to the others


def hold_out(user: np.ndarray, texts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which annotations (N,) may be asked, and which are held out. Of one user, no text is on both sides; a pair with
    one text on each is on neither.

    Whoever says A > B and B > C of ratings also says A > C. So answers to some pairs of the same texts tell others,
    even if they are noise. Therefore a user's pairs are drawn at random until a third of the user's texts is held out,
    and with a pair come all that hang together with it by texts, such as those of its prompt. If these are more than
    half of the user's pairs, it comes alone, and other pairs lose a text to it. Everybody has a pair that is held out,
    and perhaps none to be asked. Where every pair has texts of its own, a third of each user's pairs is held out.

    Args:
        user: (N,) row numbers; a user has one annotation for a pair. texts: (N, 2) numbers of the pair's texts.
    """
    turn = rng.random(len(user))
    base = texts.max(initial=0) + 1
    keys, text = np.unique(user[:, None] * base + texts, return_inverse=True)  # a text of two users is two
    owner, text, size = keys // base, text.reshape(-1, 2), len(keys)
    joined = coo_matrix((np.ones(len(user)), tuple(text.T)), (size, size))
    cluster = connected_components(joined, directed=False)[1]
    large = 2 * np.bincount(cluster[text[:, 0]])[cluster] > np.bincount(user)[owner]
    unit = np.where(large, size + np.arange(size), cluster)  # of texts that are held out at once
    turns = np.full(2 * size, np.inf)
    np.minimum.at(turns, unit[text], turn[:, None])
    order = np.lexsort((turns[unit], owner))  # of texts, whose owners are in order already
    first = np.ones(size, bool)
    first[1:] = (np.diff(owner) != 0) | (np.diff(turns[unit][order]) != 0)
    before = np.empty(size, np.int64)  # texts of the same user that are drawn earlier
    before[order] = np.maximum.accumulate(np.where(first, np.arange(size), 0)) - np.searchsorted(owner, owner)
    held = (before < TEST * np.bincount(owner)[owner] - 1e-9)[text]
    return ~held.any(1), held.all(1)


def parts(sizes: np.ndarray, users: int, cells: int) -> list[tuple[int, int]]:
    """Users with pools of these sizes (U,), parted into ranges of at most so many users and, padded, so many pairs. A
    pool that is larger is alone."""
    found, start, most = [], 0, 0
    for user, size in enumerate(sizes.tolist()):
        most = max(most, size)
        if user > start and (user - start == users or (user + 1 - start) * most > cells):
            found.append((start, user))
            start, most = user, size
    return [*found, (start, len(sizes))]


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
            `questions.next_question` does, whose sums these are for many users at once.

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
