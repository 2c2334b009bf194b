"""How well rewards predict who prefers what: accuracy, AUC, log loss and calibration, with errors over users.

z is the logit that the first answer of a pair is preferred, and y the preference for it. s = z sign(2 y - 1) is above
0 where the preferred answer has the higher reward. Each measure is the mean of contributions x (N,) of annotations:

    log loss      x_n = log(1 + exp(z_n)) - y_n z_n, also for ties and soft preferences
    accuracy      x_n = [s_n > 0]; equal rewards count 1/2
    AUC           A = mean over all n, m of [s_n + s_m > 0], equality 1/2;  x_n = 2 mean_m [s_n + s_m > 0] - A
    calibration   |mean c - mean o| of each of ten bins, weighted by its size;  x_n = (c_n - o_n) sign(of its bin)

Ties say nothing about accuracy and AUC and are left out there; a soft preference counts as what is preferred. A is the
area under the ROC curve if every pair is shown both ways round: as (z, y) and as (-z, 1 - y). c = sigmoid(|z|) is the
chance of the answer that is expected, o its preference. So no measure depends on which answer of a pair is the first.

Users are drawn, their answers are not: those of one user are alike. Hence the cluster-robust ("sandwich") error

    value = mean_n x_n        error = sqrt(U / (U - 1) sum_u (sum_{n of u} (x_n - value))^2) / N

An annotation counts once, so that a user counts by the number of answers. The same formula holds for the difference of
two rewards on the same annotations. For the AUC it is the linear part, for calibration bins and signs are held fixed.

Axes: U users, N annotations, B bins.
"""

import numpy as np
from scipy.special import betainc, expit

METRICS = ("accuracy", "auc", "log_loss", "calibration_error")
BINS = 10


def contributions(z: np.ndarray, preference: np.ndarray) -> dict[str, np.ndarray]:
    """x (N,) of each measure, for logits z (N,) and preferences (N,); NaN where an annotation does not count."""
    certain = preference != 0.5
    strength = (z * np.sign(preference - 0.5))[certain]
    found = {name: np.full(len(z), np.nan) for name in METRICS}
    found["accuracy"][certain] = (1 + np.sign(strength)) / 2
    if certain.any():
        wins = shares_won(strength, np.zeros(len(strength), np.int64))
        found["auc"][certain] = 2 * wins - wins.mean()
    found["log_loss"] = np.logaddexp(0, z) - preference * z
    bins, count = calibration_bins(z)
    miss = expit(np.abs(z)) - _expected_answer(z, preference)
    found["calibration_error"] = miss * np.sign(np.bincount(bins, miss, count))[bins]
    return found


def mean_and_error(x: np.ndarray, user: np.ndarray) -> tuple[float, float]:
    """Mean of x (N,) and its standard error over users (N,), see above; NaN is left out. Without any x the mean is
    NaN, and with fewer than two users the error is."""
    known = np.isfinite(x)
    if not known.any():
        return np.nan, np.nan
    users, row = np.unique(user[known], return_inverse=True)
    mean, count = x[known].mean(), len(users)
    if count < 2:
        return float(mean), np.nan
    off = np.bincount(row, x[known] - mean)
    return float(mean), float(np.sqrt(count / (count - 1) * np.square(off).sum()) / known.sum())


def shares_won(strength: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each n the share (N,) of those m with the same `among` (N,) where strength_n + strength_m > 0; equality
    counts 1/2. `among` are row numbers from 0."""
    size = len(strength)
    value, group = np.concatenate([strength, -strength]), np.concatenate([among, among])
    order = np.lexsort((value, group))
    begins = np.ones(2 * size, bool)  # of equal values in one group
    begins[1:] = (np.diff(value[order]) != 0) | (np.diff(group[order]) != 0)
    code = np.empty(2 * size, np.int64)
    code[order] = np.cumsum(begins) - 1
    here = np.bincount(code[:size], minlength=code.max() + 1)
    total, opposite = np.bincount(among), code[size:]
    return (np.cumsum(total)[among] - np.cumsum(here)[opposite] + here[opposite] / 2) / total[among]


def of_users(z: np.ndarray, preference: np.ndarray, user: np.ndarray, users: int) -> dict[str, np.ndarray]:
    """Accuracy, AUC and log loss (U,) of each user's own annotations; `user` (N,) are rows. NaN where there are none,
    or ties only. Calibration needs more answers than one user gives."""
    certain = preference != 0.5
    strength, owner = (z * np.sign(preference - 0.5))[certain], user[certain]
    right = (1 + np.sign(strength)) / 2
    wins = shares_won(strength, owner) if len(owner) else right
    loss = np.logaddexp(0, z) - preference * z
    columns = {"accuracy": (owner, right), "auc": (owner, wins), "log_loss": (user, loss)}
    found = {}
    for name, (row, x) in columns.items():
        count = np.bincount(row, minlength=users)
        found[name] = np.where(count > 0, np.bincount(row, x, users) / np.maximum(count, 1), np.nan)
    return found


def quantile(x: np.ndarray, share: float) -> tuple[float, float]:
    """The quantile of users' values x (U,), NaN left out, and its standard error.

    It is the k-th smallest of U, k = ceil(share U). Its error is that of an exact bootstrap over users (Maritz and
    Jarrett): the k-th smallest of U redrawn users is the i-th smallest of these with the probability
    I(i/U; k, U - k + 1) - I((i - 1)/U; k, U - k + 1), where I is the regularised incomplete beta function.
    """
    x = np.sort(x[np.isfinite(x)])
    users = len(x)
    if not users:
        return np.nan, np.nan
    place = min(max(int(np.ceil(share * users - 1e-9)), 1), users)
    if users < 2:
        return float(x[0]), np.nan
    chance = np.diff(betainc(place, users - place + 1, np.arange(users + 1) / users))
    return float(x[place - 1]), float(np.sqrt(max(chance @ np.square(x - chance @ x), 0)))


def calibration_bins(z: np.ndarray) -> tuple[np.ndarray, int]:
    """The bin (N,) of each annotation by the chance of the answer that is expected, and the number of bins. Bins have
    equal counts, but equal chances are never parted, so some bins may be empty."""
    size = np.abs(z)
    edges = np.sort(size)[np.arange(1, BINS) * len(z) // BINS]
    return np.searchsorted(edges, size, side="right"), BINS


def reliability(z: np.ndarray, preference: np.ndarray) -> list[tuple[float, float, int]]:
    """(mean expected chance, mean preference, count) of each bin that is not empty: the curve of calibration."""
    bins, _ = calibration_bins(z)
    chance, answer = expit(np.abs(z)), _expected_answer(z, preference)
    inside = [bins == number for number in np.unique(bins)]
    return [(float(chance[rows].mean()), float(answer[rows].mean()), int(rows.sum())) for rows in inside]


def _expected_answer(z: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """The preference (N,) for the answer that is expected; where neither is, 1/2, the mean of both orders."""
    return np.where(z == 0, 0.5, np.where(z > 0, preference, 1 - preference))


def majority(user: np.ndarray, pair: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """The logit (N,) of each annotation by what all *other* users say about its pair.

    If their preferences sum to a for the first answer and b for the second, its chance is (a + 1) / (a + b + 2),
    Laplace's rule: it is never 0 or 1, and 1/2 without others.
    """
    cell = np.unique(np.stack([user, pair], 1), axis=0, return_inverse=True)[1].ravel()
    votes = [np.bincount(pair, y)[pair] - np.bincount(cell, y)[cell] for y in (preference, 1 - preference)]
    first, second = (np.log1p(np.maximum(vote, 0)) for vote in votes)
    equal = np.abs(votes[0] - votes[1]) <= 1e-12 * np.bincount(pair)[pair]  # sums and differences are rounded
    return np.where(equal, 0, first - second)
