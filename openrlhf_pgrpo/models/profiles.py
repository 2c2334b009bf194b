"""The profile of a user: coefficients, their uncertainty and the answers they follow from, as a JSON file.

Axes: D base rewards.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.names import in_words, name_of
from openrlhf_pgrpo.core.posterior import Posterior, Prior, mean_and_root, posterior
from openrlhf_pgrpo.files import write_whole

SLACK = 1e-4  # of a standard deviation among users, between coefficients and a fit on another machine
LARGEST = 1e100  # of a number in a file; whatever is computed from smaller ones stays finite


@dataclass(frozen=True)
class Answer:
    """The answer of a user to a pair: the pair's name, which the caller chooses, its features (D,), the preference."""

    pair: str
    features: tuple[float, ...]
    preference: float


@dataclass(frozen=True)
class Profile:
    """Everything that is kept about a user who was asked. `load` gives back what `save` wrote, bit for bit.

    The fingerprint is that of the model that made the features. Coefficients mean nothing under another model.
    Features are saved so that the user can be fitted again under a better prior, without the pairs.
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
        fitted = posterior(np.array(features), np.array([answer.preference for answer in answers]), prior)
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
    def load(cls, path: Path, fingerprint: str, prior: Prior) -> "Profile":
        """The profile in a file, made for the model with that fingerprint, whose users have that prior.

        Raises:
            ValueError: the file is truncated, no profile, or made for another model; it has numbers that nothing
                finite follows from; or its coefficients are not those that follow from its answers.
            OSError: the file cannot be read.
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
        profile._check(path, prior)
        return profile

    def _check(self, path: Path, prior: Prior) -> None:
        """Checks that the coefficients follow from the answers, so that all who read the file mean the same user."""
        needed, got = len(prior.mean), len(self.coefficients)
        if got != needed:
            raise ValueError(
                f"{path} needs {needed} coefficients, as the model has, got {got}: restore it or ask again"
            )
        try:
            fitted = Profile.of(self.user, self.fingerprint, self.answers, prior).coefficients
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"{path} needs answers to fit a user to, got {error}: restore it or ask again") from error
        far = np.abs(self.coefficients - fitted) > SLACK * np.sqrt(np.diag(prior.covariance))
        if far.any():
            first = int(far.argmax())
            raise ValueError(
                f"{path} needs the coefficients that follow from its {len(self.answers)} answers, got "
                f"{self.coefficients[first]:g} instead of {fitted[first]:g} as coefficient {first}: restore it or ask "
                "again"
            )

    @classmethod
    def _from(cls, content: Any) -> "Profile":
        content = _record(content, "a profile", ("user", "fingerprint", "coefficients", "covariance", "answers"))
        for key, kind in (("user", str), ("fingerprint", str), ("answers", list)):
            if not isinstance(content[key], kind):
                raise ValueError(f"{in_words(content[key])} as {key}")
        check_user(content["user"])
        if not content["fingerprint"].isprintable():
            raise ValueError(f"{in_words(content['fingerprint'])} as fingerprint")
        fitted = Posterior(_numbers(content["coefficients"]), _numbers(content["covariance"]))
        mean_and_root(fitted)
        if not np.allclose(fitted.covariance, fitted.covariance.T, rtol=1e-9, atol=0):
            raise ValueError("a covariance that is not symmetric")
        answers = []
        for number, row in enumerate(content["answers"]):
            row = _record(row, f"answer {number}", ("pair", "features", "preference"))
            if not isinstance(row["pair"], str):
                raise ValueError(f"{in_words(row['pair'])} as pair of answer {number}")
            features, preference = _numbers(row["features"]), _numbers(row["preference"])
            if preference.shape:
                raise ValueError(f"{in_words(row['preference'])} as preference of answer {number}")
            if features.shape != fitted.mean.shape or not 0 <= preference <= 1:
                raise ValueError(f"features of shape {features.shape} and preference {preference} as answer {number}")
            answers.append(Answer(row["pair"], tuple(features.tolist()), float(preference)))
        return cls(content["user"], content["fingerprint"], *fitted, tuple(answers))


def check_user(name: str) -> None:
    """Checks the name of a user.

    Raises:
        ValueError: it is blank, or no text that UTF-8 can hold.
    """
    try:
        name_of(name).encode("utf-8")
    except ValueError as error:
        raise ValueError(f"a user needs a name that is not blank, in UTF-8, got {name!r}: choose another") from error


def _record(content: Any, name: str, keys: tuple[str, ...]) -> dict:
    if not isinstance(content, dict) or set(content) != set(keys):
        found = f"the keys {str(sorted(content))[:200]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{found} for {name}, which has {', '.join(keys)}")
    return content


def _numbers(values: Any) -> np.ndarray:
    """An array of a number, or of nested lists of numbers, from JSON."""
    array = np.array(values)
    if array.dtype.kind not in "if" or not (np.abs(array.astype(np.float64)) <= LARGEST).all():
        raise ValueError(f"{in_words(values)} instead of numbers from -{LARGEST:g} to {LARGEST:g}")
    return array.astype(np.float64)
