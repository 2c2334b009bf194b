"""Makes preference groups by clustering the users' coefficients; a policy is then trained on them with P-GRPO.

The model is a mixture of normal distributions with one covariance (scikit-learn): preference groups differ in what
they want, and people within each of them vary alike. The number of groups is the one with the lowest Bayesian
information criterion (BIC). Unlike a silhouette, BIC can also choose a single group. For a new user, the chance of
each preference group follows from the answers, with the group's distribution as prior.

Such a mixture does not depend on the units of the base rewards, but the search for it does: k-means, from which it
starts, sees the directions in which users vary most. So it starts from several views of the users, see `views`.

Axes: U users, D base rewards, K of D directions in which users vary, G preference groups.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from openrlhf_pgrpo.core.names import user_in
from openrlhf_pgrpo.core.posterior import Prior, log_evidence
from openrlhf_pgrpo.files import check_folder, held_in, write_rows
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.tables import Table, read_table
from openrlhf_pgrpo.models.users import Users, profile_files
from openrlhf_pgrpo.progress import along

MOST_GROUPS = 10
USERS_PER_GROUP = 5  # the least average size of a group when BIC chooses the number
STARTS = 10
LEAST_SPREAD = 1e-6  # of a coefficient's size: models are saved in float32, which has seven digits
LEAST_VARIANCE = 1e-6  # within a preference group, of that among all users; so that users may be exactly alike
SHOWN = 20  # new users with a line each


def group_users(
    model: str,
    data: str | Path,
    output: Path,
    groups: int | None = None,
    user_key: str = "user",
    pref_group_key: str = "pref_group",
    profiles: Sequence[Path] = (),
    split: str | None = None,
) -> list[str]:
    """Writes the data with the preference group of each row's user; returns the lines to print.

    Args:
        model: folder or hub name. data, split: as `tables.read_table`. groups: G; None chooses it by BIC.
        profiles: files of new users in the data.

    Raises:
        ValueError: arguments or files that do not fit.
        OSError: a file cannot be read or written.
    """
    read = {f"--profile {file}": file for path in profiles for file in profile_files(path)}
    check_folder(output, "--output", {"--data": data, **held_in(data, "--data"), **read, **held_in(model, "--model")})
    table, folder = name_users(read_table(data, {user_key: object}, split), user_key).as_json(), Folder(model)
    users = Users(folder, profiles)
    found = cluster(folder.coefficients, groups)
    for number, row in enumerate(table.rows):
        users.check([row[user_key]], table.place(number))
    new_users = {profile.user: chances_of(profile, found) for profile in users.profiles}
    chances = dict(zip(folder.users, found.of_users)) | new_users
    write_rows(output, assign(table, chances, found.names, user_key, pref_group_key))
    lines = describe_choice(found, len(folder.users)) if groups is None else []
    lines += [f"{name}: {share:.1%} of {len(folder.users)} users" for name, share in zip(found.names, found.shares)]
    lines += describe_new(new_users, found.names)
    return [*lines, f"{output}: train with --data.pref_group_key {pref_group_key} --data.user_key {user_key}"]


def describe_new(chances: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """A line for each new user, as long as these are few, else how many are in which preference group."""
    best = {user: int(chance.argmax()) for user, chance in chances.items()}
    if len(best) <= SHOWN:
        return [f"{user}: {names[row]}, with a probability of {chances[user][row]:.2f}" for user, row in best.items()]
    counts = Counter(names[row] for row in best.values())
    return [f"{len(best)} new users: {', '.join(f'{counts[name]} in {name}' for name in names)}"]


def name_users(table: Table, user_key: str) -> Table:
    """The table with the name of each user, which may be a number in the data.

    Raises:
        ValueError: a row without a user; with its place.
    """
    rows = [{**row, user_key: user_in(row, user_key, table.place(number))} for number, row in enumerate(table.rows)]
    return table._replace(rows=rows)


@dataclass(frozen=True)
class PreferenceGroups:
    """Preference groups named group-1 ... group-G, the largest first.

    Attributes:
        shares: (G,) of the users. means: (G, D). covariance: (D, D) within each. of_users: (U, G) chances.
        criteria: BIC of each number of preference groups that was tried, for whitened coefficients: these can be
            compared among themselves only, and do not change with the units of the base rewards.
        different: users who differ.
    """

    shares: np.ndarray
    means: np.ndarray
    covariance: np.ndarray
    of_users: np.ndarray
    criteria: dict[int, float]
    different: int

    @property
    def names(self) -> list[str]:
        return [f"group-{number}" for number in range(1, len(self.shares) + 1)]

    def of_answers(self, answers: Sequence[Answer]) -> np.ndarray:
        """The chance (G,) that a new user who gave these answers belongs to each; without answers, the shares."""
        features = [answer.features for answer in answers] or np.empty((0, self.means.shape[1]))
        preferences = [answer.preference for answer in answers]
        evidence = [log_evidence(features, preferences, Prior(mean, self.covariance)) for mean in self.means]
        return softmax(np.log(self.shares) + evidence)


def chances_of(profile: Profile, found: PreferenceGroups) -> np.ndarray:
    """The chance (G,) of each preference group for a new user.

    Raises:
        ValueError: answers whose features are out of all proportion to the model's coefficients; with the user.
    """
    try:
        return found.of_answers(profile.answers)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(
            f"the profile of {profile.user!r} needs answers that fit the model, got {error}: restore it or ask again"
        ) from error


def cluster(coefficients: np.ndarray, groups: int | None = None) -> PreferenceGroups:
    """Preference groups of users with coefficients (U, D). The order of the users does not matter.

    Args:
        groups: G; None chooses it by BIC, up to 10 and up to a fifth of the users.

    Raises:
        ValueError: a single user, or fewer users with different coefficients than preference groups.
    """
    if len(coefficients) < 2:
        raise ValueError(f"preference groups need at least two users, got {len(coefficients)}")
    different = len(np.unique(coefficients, axis=0))
    if groups is not None and not 1 <= groups <= different:
        raise ValueError(f"--groups needs a number from 1 to {different}, the users who differ, got {groups}")
    sort = np.lexsort(coefficients.T)  # k-means draws users by their place
    users = coefficients[sort]
    white = whiten(users)
    seen = views(users, white)
    most = max(1, min(MOST_GROUPS, different, len(users) // USERS_PER_GROUP))
    tried = [groups] if groups else range(1, most + 1)
    fitted = {k: _fit(white.users, seen, k) for k in along(tried, "numbers of preference groups", "tried")}
    criteria = {k: float(mixture.bic(white.users)) for k, mixture in fitted.items()}
    best = fitted[min(criteria, key=criteria.get)]
    order = np.argsort(-best.weights_, kind="stable")
    of_users = np.empty((len(users), len(order)))
    of_users[sort] = best.predict_proba(white.users)[:, order]
    means = white.mean + best.means_[order] @ white.axes
    return PreferenceGroups(
        best.weights_[order], means, white.covariance(best.covariances_), of_users, criteria, different
    )


@dataclass(frozen=True)
class Whitened:
    """Users in coordinates in which they vary alike in all directions, and the way back.

    Attributes:
        users: (U, K), of mean 0 and covariance I; coefficients are mean + users @ axes.
        mean: (D,). axes: (K, D). units: (D,) what each coefficient is measured in.
    """

    users: np.ndarray
    mean: np.ndarray
    axes: np.ndarray
    units: np.ndarray

    def covariance(self, white: np.ndarray) -> np.ndarray:
        """A covariance (D, D) of coefficients, from one (K, K) here. Where users do not vary, LEAST_SPREAD is left, so
        that it can be a prior."""
        return self.axes.T @ white @ self.axes + np.diag(np.square(LEAST_SPREAD * self.units))


def whiten(coefficients: np.ndarray) -> Whitened:
    """Coefficients (U, D) without the directions in which users differ by rounding alone."""
    mean, std, size = coefficients.mean(0), coefficients.std(0), np.abs(coefficients).max(0)
    units = np.where(std > LEAST_SPREAD * size, std, np.where(size > 0, size, 1.0))
    off = (coefficients - mean) / units
    _, spread, turn = np.linalg.svd(off / np.sqrt(len(off)), full_matrices=False)
    kept = spread > LEAST_SPREAD
    kept[0] = True  # users who are all alike have one direction too, in which they do not vary
    spread, turn = np.where(spread > 0, spread, 1.0)[kept], turn[kept]
    return Whitened(off @ turn.T / spread, mean, spread[:, None] * turn * units, units)


def views(coefficients: np.ndarray, white: Whitened) -> list[tuple[np.ndarray, int]]:
    """The users, (U, any), as k-means is to see them, and from how many starts.

    Whitened, preference groups are found whatever the units, but among many base rewards those that tell them apart
    are lost. As they are, preference groups are found that differ in what users differ in most; and in each base
    reward alone, those that differ in this one.
    """
    off = coefficients - white.mean
    whole = [white.users, off / (off.std() or 1.0)]
    return [*((view, STARTS) for view in whole), *((column[:, None], 1) for column in (off / white.units).T)]


def _fit(users: np.ndarray, seen: list[tuple[np.ndarray, int]], groups: int) -> GaussianMixture:
    """The most likely mixture for whitened users (U, K) among those that are found from k-means in each view."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # only the best start counts; others may not converge
        starts = {}  # each partition once; k-means numbers its parts at random
        for view, count in seen:
            for seed in range(count):
                labels = KMeans(groups, n_init=1, random_state=seed).fit_predict(view)
                _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
                if len(first) == groups:  # fewer, if users differ too little in this view
                    starts[first.argsort().argsort()[labels].tobytes()] = labels
        found = [_mixture(users, labels, groups) for labels in starts.values()]
        return max(found or [_mixture(users, np.arange(len(users)) % groups, groups)], key=lambda m: m.lower_bound_)


def _mixture(users: np.ndarray, labels: np.ndarray, groups: int) -> GaussianMixture:
    """The mixture that expectation maximisation finds from a partition of the users; labels (U,)."""
    count = np.bincount(labels)
    means = np.eye(groups)[labels].T @ users / count[:, None]
    off = users - means[labels]
    covariance = off.T @ off / len(users) + LEAST_VARIANCE * np.eye(users.shape[1])
    return GaussianMixture(
        groups,
        covariance_type="tied",
        max_iter=500,
        reg_covar=LEAST_VARIANCE,
        weights_init=count / len(users),
        means_init=means,
        precisions_init=np.linalg.inv(covariance),
    ).fit(users)


def describe_choice(found: PreferenceGroups, users: int) -> list[str]:
    if found.different == 1:
        return [f"one preference group, which is no use to P-GRPO: all {users} users have the same coefficients"]
    if len(found.criteria) == 1:  # BIC would split so few users who are all alike
        return [
            f"only one preference group was tried: {users} users are too few to choose more, {USERS_PER_GROUP} for "
            "each; --groups 2 splits them"
        ]
    tried = ", ".join(f"{k}: {criterion:.1f}" for k, criterion in found.criteria.items())
    lines = [f"{len(found.shares)} preference groups have the lowest BIC ({tried})"]
    if len(found.shares) == 1:
        lines.append("one preference group is no use to P-GRPO: the users differ by degrees; --groups splits them")
    return lines


def assign(table: Table, chances: dict[str, np.ndarray], names: list[str], user_key: str, column: str) -> list[dict]:
    """The rows with the preference group of their user in `column`, and its chance in `column`_probability.

    Args:
        chances: (G,) of each user in the table.

    Raises:
        ValueError: a row that has one of these columns already; with its place.
    """
    done = []
    for number, row in enumerate(table.rows):
        taken = {column, f"{column}_probability"} & set(row)
        if taken:
            raise ValueError(
                f"{table.place(number)} needs a new column for the preference group, got {taken.pop()!r}, which it "
                "has: choose another --pref_group_key"
            )
        chance = chances[row[user_key]]
        best = int(chance.argmax())
        done.append({**row, column: names[best], f"{column}_probability": float(chance[best])})
    return done
