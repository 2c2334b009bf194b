"""The profile of a user: coefficients, their uncertainty and the answers they follow from, as a JSON file.

    user, fingerprint, coefficients (D,), covariance (D, D)
    answers     pair, features (D,), preference, and the texts prompt, a and b; without texts in files from before they
                were kept
    skipped     pair, reason, after; no such key where nothing was skipped

Axes: D base rewards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.names import in_words, name_of
from openrlhf_pgrpo.core.posterior import Posterior, Prior, mean_and_root, posterior, posteriors
from openrlhf_pgrpo.files import write_whole
from openrlhf_pgrpo.models.messages import Text, no_text

SLACK = 1e-4  # of a standard deviation among users, between coefficients and a fit on another machine
LARGEST = 1e100  # of a number in a file; whatever is computed from smaller ones stays finite
TEXTS = ("prompt", "a", "b")  # of an answer, as they were given and not as a template writes them
SKIP, BOTH_BAD = "skip", "both bad"  # why a pair has no preference


@dataclass(frozen=True)
class Answer:
    """The answer of a user to a pair: the pair's name, which the caller chooses, its features (D,), the preference
    for the text a. Another model needs the texts; answers from before they were kept have none."""

    pair: str
    features: tuple[float, ...]
    preference: float
    prompt: Text | None = None
    a: Text | None = None
    b: Text | None = None


@dataclass(frozen=True)
class Skipped:
    """A pair that a user was shown and gave no preference for, SKIP or BOTH_BAD, after so many answers."""

    pair: str
    reason: str
    after: int


@dataclass(frozen=True)
class Profile:
    """Everything that is kept about a user who was asked. `load` gives back what `save` wrote, bit for bit.

    The fingerprint is that of the model that made the features. Coefficients mean nothing under another model.
    Features are saved so that the user can be fitted again under a better prior, texts for another model. What was
    skipped has no effect on the coefficients.
    """

    user: str
    fingerprint: str
    coefficients: np.ndarray
    covariance: np.ndarray
    answers: tuple[Answer, ...]
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(
        cls,
        user: str,
        fingerprint: str,
        answers: Sequence[Answer],
        prior: Prior,
        skipped: Sequence[Skipped] = (),
    ) -> "Profile":
        """The profile that follows from the answers.

        Raises:
            ValueError: as `posterior`.
        """
        features = [answer.features for answer in answers] or np.empty((0, len(prior.mean)))
        fitted = posterior(np.array(features), np.array([answer.preference for answer in answers]), prior)
        return cls(user, fingerprint, *fitted, tuple(answers), tuple(skipped))

    @classmethod
    def many(cls, answers: Mapping[str, Sequence[Answer]], fingerprint: str, prior: Prior) -> list["Profile"]:
        """The profiles of many users by name, in their order: those of `of`, up to rounding, and much faster.

        Raises:
            ValueError: as `posterior`.
        """
        alike: dict[int, list[str]] = {}  # users with as many answers are fitted together, so that nothing is padded
        for user, said in answers.items():
            alike.setdefault(len(said), []).append(user)
        found = {}
        for size, users in alike.items():
            features = np.array([[one.features for one in answers[user]] for user in users])
            preferences = np.array([[one.preference for one in answers[user]] for user in users])
            fitted = posteriors(features.reshape(len(users), size, len(prior.mean)), preferences, prior)
            for user, mean, covariance in zip(users, *fitted):
                found[user] = cls(user, fingerprint, mean, covariance, tuple(answers[user]))
        return [found[user] for user in answers]

    @property
    def posterior(self) -> Posterior:
        return Posterior(self.coefficients, self.covariance)

    def save(self, path: Path) -> None:
        """Writes the file; when this returns, it is on the disk."""
        content: dict[str, Any] = {
            "user": self.user,
            "fingerprint": self.fingerprint,
            "coefficients": self.coefficients.tolist(),
            "covariance": self.covariance.tolist(),
            "answers": [{key: of for key, of in vars(said).items() if of is not None} for said in self.answers],
        }
        if self.skipped:
            content["skipped"] = [asdict(one) for one in self.skipped]
        write_whole(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str, prior: Prior) -> "Profile":
        """The profile in a file, made for the model with that fingerprint, whose users have that prior.

        Raises:
            ValueError: the file is truncated, no profile, or made for another model; it has numbers that nothing
                finite follows from; or its coefficients are not those that follow from its answers.
            OSError: the file cannot be read.
        """
        (profile,) = cls.load_all([path], fingerprint, prior)
        if isinstance(profile, ValueError):
            raise profile
        return profile

    @classmethod
    def load_all(cls, paths: Sequence[Path], fingerprint: str, prior: Prior) -> list["Profile | ValueError"]:
        """What `load` gives or raises of each file; thousands are checked at once."""
        found: list[Profile | ValueError] = []
        for path in paths:
            try:
                found.append(cls._read_for(path, fingerprint, len(prior.mean)))
            except ValueError as error:
                found.append(error)
        whole = {str(row): profile for row, profile in enumerate(found) if isinstance(profile, Profile)}
        try:
            fitted = cls.many({row: profile.answers for row, profile in whole.items()}, fingerprint, prior)
            follow = dict(zip(whole, fitted))
        except (ValueError, ArithmeticError):  # one of them has no fit; which one is found one by one
            follow = {}
        for row, profile in whole.items():
            try:
                profile._check(paths[int(row)], prior, follow.get(row))
            except ValueError as error:
                found[int(row)] = error
        return found

    @classmethod
    def _read_for(cls, path: Path, fingerprint: str, factors: int) -> "Profile":
        """The profile in a file, if it is one for this model, which has so many base rewards."""
        profile = cls.read(path)
        if not same_model(profile.fingerprint, fingerprint):
            raise ValueError(
                f"{path} needs to be a profile for the model {fingerprint}, got one for {profile.fingerprint}: "
                "coefficients mean nothing under another model; use that one, or fit the profile again with "
                "openrlhf-pgrpo refit"
            )
        if len(profile.coefficients) != factors:
            raise ValueError(
                f"{path} needs {factors} coefficients, as the model has, got {len(profile.coefficients)}: restore it "
                "or ask again"
            )
        return profile

    @classmethod
    def read(cls, path: Path) -> "Profile":
        """The profile in a file, made for any model.

        Raises:
            ValueError: the file is truncated, or no profile.
            OSError: the file cannot be read.
        """
        try:
            return cls._from(json.loads(Path(path).read_bytes()))
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} needs to be a whole profile, got {error}: restore it or ask again") from error

    def _check(self, path: Path, prior: Prior, fitted: "Profile | None") -> None:
        """Checks that the coefficients follow from the answers, so that all who read the file mean the same user; what
        does follow is `fitted`, unless that is yet to be done."""
        if fitted is None:
            try:
                fitted = Profile.of(self.user, self.fingerprint, self.answers, prior)
            except (ValueError, ArithmeticError) as error:
                raise ValueError(
                    f"{path} needs answers to fit a user to, got {error}: restore it or ask again"
                ) from error
        scale = np.sqrt(np.diag(prior.covariance))
        far = np.abs(self.coefficients - fitted.coefficients) > SLACK * scale
        if far.any():
            first = int(far.argmax())
            raise ValueError(
                f"{path} needs the coefficients that follow from its {len(self.answers)} answers, got "
                f"{self.coefficients[first]:g} instead of {fitted.coefficients[first]:g} as coefficient {first}: "
                "restore it or ask again"
            )
        if (np.abs(self.covariance - fitted.covariance) > SLACK * np.outer(scale, scale)).any():
            raise ValueError(
                f"{path} needs the covariance that follows from its {len(self.answers)} answers, got another: restore "
                "it or ask again"
            )

    @classmethod
    def _from(cls, content: Any) -> "Profile":
        keys = ("user", "fingerprint", "coefficients", "covariance", "answers")
        content = {"skipped": [], **_record(content, "a profile", keys, ("skipped",))}
        for key, kind in (("user", str), ("fingerprint", str), ("answers", list), ("skipped", list)):
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
            row = _record(row, f"answer {number}", ("pair", "features", "preference"), TEXTS)
            if not isinstance(row["pair"], str):
                raise ValueError(f"{in_words(row['pair'])} as pair of answer {number}")
            features, preference = _numbers(row["features"]), _numbers(row["preference"])
            if preference.shape:
                raise ValueError(f"{in_words(row['preference'])} as preference of answer {number}")
            if features.shape != fitted.mean.shape or not 0 <= preference <= 1:
                raise ValueError(f"features of shape {features.shape} and preference {preference} as answer {number}")
            texts = [row[key] for key in TEXTS if key in row]
            for key, text in zip(TEXTS, texts):
                if wrong := no_text(text):
                    raise ValueError(f"{wrong} as {key} of answer {number}")
            answers.append(Answer(row["pair"], tuple(features.tolist()), float(preference), *texts))
        skipped = _skipped(content["skipped"], len(answers))
        return cls(content["user"], content["fingerprint"], *fitted, tuple(answers), skipped)


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model.

    A model from before forms of texts were recorded is told its form, and its fingerprint ends in that form. There is
    none for who needs no form, as `groups`, and in profiles from before this.
    """
    (files, _, form), (other_files, _, other_form) = one.partition("+"), other.partition("+")
    return files == other_files and (form == other_form or not form or not other_form)


def check_user(name: str) -> None:
    """Checks the name of a user.

    Raises:
        ValueError: it is blank, or no text that UTF-8 can hold.
    """
    try:
        name_of(name).encode("utf-8")
    except ValueError as error:
        raise ValueError(f"a user needs a name that is not blank, in UTF-8, got {name!r}: choose another") from error


def _skipped(rows: list, answers: int) -> tuple[Skipped, ...]:
    """What was skipped, from JSON, in its order among so many answers."""
    found, before = [], 0
    for number, row in enumerate(rows):
        row = _record(row, f"skipped pair {number}", ("pair", "reason", "after"))
        if not isinstance(row["pair"], str) or row["reason"] not in (SKIP, BOTH_BAD):
            raise ValueError(f"{in_words(row['pair'])} and {in_words(row['reason'])} as skipped pair {number}")
        after = row["after"]
        if not isinstance(after, int) or isinstance(after, bool) or not before <= after <= answers:
            raise ValueError(f"skipped pair {number} after {in_words(after)} of {answers} answers")
        found.append(Skipped(**row))
        before = after
    return tuple(found)


def _record(content: Any, name: str, keys: tuple[str, ...], may_have: tuple[str, ...] = ()) -> dict:
    """The content, a dict with these keys, and all or none of those that it may have."""
    if not isinstance(content, dict) or set(content) not in (set(keys), {*keys, *may_have}):
        found = f"the keys {str(sorted(content))[:200]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{found} for {name}, which has {', '.join(keys)}")
    return content


def _numbers(values: Any) -> np.ndarray:
    """An array of a number, or of nested lists of numbers, from JSON."""
    array = np.array(values)
    if array.dtype.kind not in "if" or not (np.abs(array.astype(np.float64)) <= LARGEST).all():
        raise ValueError(f"{in_words(values)} instead of numbers from -{LARGEST:g} to {LARGEST:g}")
    return array.astype(np.float64)
