"""Makes preference groups by clustering the users' coefficients; a policy is then trained on them with P-GRPO.

The model is a mixture of normal distributions with one covariance (scikit-learn): preference groups differ in what
they want, and people within each of them vary alike. The number of groups is the one with the lowest Bayesian
information criterion (BIC). Unlike a silhouette, BIC can also choose a single group. For a new user, the chance of
each preference group follows from the answers, with the group's distribution as prior.

Axes: U users, D base rewards, G preference groups.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from openrlhf_pgrpo.core.names import user_in
from openrlhf_pgrpo.core.posterior import Prior, log_evidence
from openrlhf_pgrpo.files import check_folder, data_in, held_in, write_rows
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.tables import Table, read_table
from openrlhf_pgrpo.models.users import Users, profile_files
from openrlhf_pgrpo.people.terminal import on_one_line
from openrlhf_pgrpo.progress import along

MOST_GROUPS = 10
USERS_PER_GROUP = 5  # the least average size of a group when BIC chooses the number
STARTS = 10
LEAST_SPREAD = 1e-6  # of a base reward's size: models are saved in float32, which has seven digits
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
    check_folder(output, "--output", {**data_in(data, "--data"), **read, **held_in(model, "--model")})
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
        return [
            f"{on_one_line(user)}: {names[row]}, with a probability of {chances[user][row]:.2f}"
            for user, row in best.items()
        ]
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
        criteria: BIC of each number of preference groups that was tried, for coefficients in their own units, to be
            compared with each other alone. different: users who differ.
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
    sort = np.lexsort(coefficients.T)  # the search draws users by their place
    ordered = coefficients[sort]
    center, units = ordered.mean(0), units_of(ordered)
    users = (ordered - center) / units
    most = max(1, min(MOST_GROUPS, different, len(users) // USERS_PER_GROUP))
    tried = [groups] if groups else range(1, most + 1)
    fitted = {k: _fit(users, k) for k in along(tried, "numbers of preference groups", "tried")}
    criteria = {k: float(mixture.bic(users)) for k, mixture in fitted.items()}
    best = fitted[min(criteria, key=criteria.get)]
    order = np.argsort(-best.weights_, kind="stable")
    of_users = np.empty((len(users), len(order)))
    of_users[sort] = best.predict_proba(users)[:, order]
    means, covariance = center + best.means_[order] * units, best.covariances_ * np.outer(units, units)
    return PreferenceGroups(best.weights_[order], means, covariance, of_users, criteria, different)


def units_of(coefficients: np.ndarray) -> np.ndarray:
    """What each base reward (D,) is measured in: its spread among the users, or its size if they differ in rounding.

    The search starts from k-means, which would split the users by the base reward that varies most.
    """
    spread, size = coefficients.std(0), np.abs(coefficients).max(0)
    return np.where(spread > LEAST_SPREAD * size, spread, np.where(size > 0, size, 1.0))


def _fit(users: np.ndarray, groups: int) -> GaussianMixture:
    mixture = GaussianMixture(groups, covariance_type="tied", n_init=STARTS, max_iter=500, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # only the best start counts; others may not converge
        return mixture.fit(users)


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
