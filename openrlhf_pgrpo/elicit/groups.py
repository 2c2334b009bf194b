"""Preference groups out of users: clusters of their coefficients, for the P-GRPO of a policy.

A mixture of normal distributions with one covariance (scikit-learn): preference groups differ in what they want, and
people differ inside of each alike. Their number is the one with the lowest Bayesian information criterion (BIC), which,
other than a silhouette, can also say that there is only one. A new user's chance of each preference group follows from
the answers, with the group's distribution as prior.

Axes: U users, D base rewards, G preference groups.
"""

import warnings
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from openrlhf_pgrpo.core.elicitation import Answer, Prior, log_evidence

MOST_GROUPS = 10
USERS_PER_GROUP = 5  # at least, on average, where the number is chosen
STARTS = 10


@dataclass(frozen=True)
class PreferenceGroups:
    """Names are group-1 ... group-G, the largest first.

    Attributes:
        shares: (G,) of the users. means: (G, D). covariance: (D, D) within all. of_users: (U, G) chances.
        criteria: BIC of each number of preference groups that was tried.
    """

    shares: np.ndarray
    means: np.ndarray
    covariance: np.ndarray
    of_users: np.ndarray
    criteria: dict[int, float]

    @property
    def names(self) -> list[str]:
        return [f"group-{number}" for number in range(1, len(self.shares) + 1)]

    def of_answers(self, answers: list[Answer]) -> np.ndarray:
        """The chance (G,) that a new user who gave these answers belongs to each; without answers, the shares."""
        features = [answer.features for answer in answers] or np.empty((0, self.means.shape[1]))
        preferences = [answer.preference for answer in answers]
        evidence = [log_evidence(features, preferences, Prior(mean, self.covariance)) for mean in self.means]
        return softmax(np.log(self.shares) + evidence)


def cluster(coefficients: np.ndarray, groups: Optional[int] = None) -> PreferenceGroups:
    """Preference groups of users with coefficients (U, D).

    Args:
        groups: G; None chooses it by BIC, up to 10 and to a fifth of the users.

    Raises:
        ValueError: a single user, or fewer users with different coefficients than preference groups.
    """
    if len(coefficients) < 2:
        raise ValueError(f"preference groups need at least two users, got {len(coefficients)}")
    different = len(np.unique(coefficients, axis=0))
    if groups is not None and not 1 <= groups <= different:
        raise ValueError(f"--groups needs a number from 1 to {different}, the users who differ, got {groups}")
    scale = coefficients.std() or 1.0  # the regularisation below is meant for numbers around 1
    most = max(1, min(MOST_GROUPS, different // USERS_PER_GROUP))
    fitted = {k: _fit(coefficients / scale, k) for k in ([groups] if groups else range(1, most + 1))}
    criteria = {k: float(mixture.bic(coefficients / scale)) for k, mixture in fitted.items()}
    best = fitted[min(criteria, key=criteria.get)]
    order = np.argsort(-best.weights_, kind="stable")
    return PreferenceGroups(
        best.weights_[order],
        best.means_[order] * scale,
        best.covariances_ * scale**2,
        best.predict_proba(coefficients / scale)[:, order],
        criteria,
    )


def _fit(coefficients: np.ndarray, groups: int) -> GaussianMixture:
    mixture = GaussianMixture(groups, covariance_type="tied", n_init=STARTS, max_iter=500, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the best start counts; others may still be moving
        return mixture.fit(coefficients)


def assign(rows: list[tuple[int, dict]], chances: dict[str, np.ndarray], names: list[str], user_key: str, column: str):
    """The rows of a dataset with the preference group of their user in `column`, its chance in `column`_probability.

    Args:
        rows: line numbers and contents, as `read_rows` gives them. chances: (G,) of each user.

    Raises:
        ValueError: a user without chances, or a column that is there already; with its line.
    """
    done = []
    for number, row in rows:
        user = row[user_key]
        if user not in chances:
            raise ValueError(
                f"line {number} needs a user whom the model or a profile knows, got {user!r}: "
                "ask them with openrlhf-pgrpo elicit and give --profile"
            )
        taken = {column, f"{column}_probability"} & set(row)
        if taken:
            raise ValueError(f"line {number} needs other columns than {taken.pop()!r}: choose another --group_key")
        best = int(chances[user].argmax())
        done.append({**row, column: names[best], f"{column}_probability": float(chances[user][best])})
    return done
