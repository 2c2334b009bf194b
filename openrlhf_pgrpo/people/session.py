"""A session with one person: the next question, the answers, and what the model believes. Terminal and page show it.

Axes: P pairs, D base rewards.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.posterior import Prior, mean_and_root, posterior
from openrlhf_pgrpo.core.questions import enough, next_question, predict, predictive_entropy
from openrlhf_pgrpo.files import locked
from openrlhf_pgrpo.models.profiles import BOTH_BAD, SKIP, Answer, Profile, Skipped
from openrlhf_pgrpo.people.pool import Pair, shown

LEFT, TIE, RIGHT = "left", "tie", "right"
PREFERENCES = {LEFT: 1.0, TIE: 0.5, RIGHT: 0.0}  # for the answer on the left
NO_PREFERENCE = (SKIP, BOTH_BAD)  # the other choices
DEVIATIONS = 1.645  # 90 % of a normal distribution lie within this many standard deviations
LARGEST_REWARD = np.finfo(np.float32).max  # a model computes in float32
LONGEST_NAME = 200  # bytes of a profile's name without .json; file systems take 255, a lock's name is longer
MOST_PROMPTS, MOST_ANSWERS = 3, 5  # of the ranking at the end


class Question(NamedTuple):
    """A pair as it is shown."""

    name: str
    prompt: str
    left: str
    right: str


class Coefficient(NamedTuple):
    """A coefficient with its 90 % interval, and the 90 % interval of the trained users."""

    mean: float
    low: float
    high: float
    usual_low: float
    usual_high: float


class Forecast(NamedTuple):
    """The last answer, and the chance that the model had given to the left one."""

    choice: str
    left: float


class Ranked(NamedTuple):
    """An answer's reward for this user and its standard deviation, relative to the mean reward of all answers."""

    answer: str
    reward: float
    deviation: float


class NotNow(ValueError):
    """The question is not open, or there is no answer to take back. Nothing was changed."""


class Session:
    """Asks the pair with the most expected information next, and saves the profile after every answer.

    Args:
        pairs: the pool (P,). a, b: base rewards (P, D) of its answers. prior: of a user of this model.
        user, fingerprint: of the profile. path: its file; answers in an existing file count. Its coefficients are
            fitted again to its answers, as after every answer.
        questions, level: when to stop, as `core.questions.enough`. The end of the pool always stops.

    Attributes:
        profile: of the answers on the disk. question: the open one; None at the end. entropy: bits per pair.
        questions: that can be answered at most, with those that are.

    Raises:
        ValueError: a profile of another user, or one that `Profile.load` refuses; or base rewards that are not finite.
        OSError: the profile cannot be read or written.
    """

    def __init__(
        self,
        pairs: list[Pair],
        a: np.ndarray,
        b: np.ndarray,
        prior: Prior,
        user: str,
        fingerprint: str,
        path: Path,
        questions: int | None = 10,
        level: float | None = None,
    ):
        # Two sessions may name one file by different links.
        self.path = Path(os.path.realpath(path)) if path.is_symlink() else path
        self.pairs, self.prior = pairs, prior
        self.rewards = tuple(_checked(rewards, len(pairs), len(prior.mean)) for rewards in (a, b))
        self.features = self.rewards[0] - self.rewards[1]
        self._most_questions, self.level = questions, level
        self.rows = {pair.name: row for row, pair in enumerate(pairs)}
        # Bad features are refused before the first answer: ties to all pairs leave the least variance.
        predictive_entropy(self.features, posterior(self.features, np.full(len(pairs), 0.5), prior))
        answers, skipped = self._open(user, fingerprint)
        try:
            self._continue_from(Profile.of(user, fingerprint, answers, prior, skipped))
            self.forecast(), self.ranking()  # whatever will be shown can be computed
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"{path} needs answers to fit a user to, got {error}: restore it or ask again") from error

    def _open(self, user: str, fingerprint: str) -> tuple[tuple[Answer, ...], tuple[Skipped, ...]]:
        """The answers in the file and what was skipped, none where there is no file. The first choice makes one, to
        skip is one, too. Without an answer its user is not known."""
        with locked(self.path):  # fails now if the folder cannot be written
            self._content = content(self.path)
            if self._content is None:
                return (), ()
            profile = Profile.load(self.path, fingerprint, self.prior)
        if profile.user != user:
            raise ValueError(
                f"{self.path} needs a profile of {user!r}, got one of {profile.user!r}: name another file"
            )
        return profile.answers, profile.skipped

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._content is not None

    def _continue_from(self, profile: Profile) -> None:
        """Chooses the next question after the answers of this profile."""
        answered = {self.rows[said.pair] for said in profile.answers if said.pair in self.rows}
        skipped = {self.rows[one.pair] for one in profile.skipped if one.pair in self.rows} - answered
        questions = self._most_questions
        if questions is not None:
            elsewhere = sum(said.pair not in self.rows for said in profile.answers)
            questions = min(questions, elsewhere + len(self.pairs) - len(skipped))
        row, entropy = next_question(self.features, profile.posterior, sorted(answered | skipped))
        over = row is None or enough(len(profile.answers), entropy, questions, self.level)
        question = None if over else self._shown(row)
        self.profile, self.entropy, self.question, self.questions = profile, entropy, question, questions

    def _swapped(self, name: str) -> bool:
        """Whether answer b is on the left. Sides are mixed: people favour a side, and all good answers may be in a."""
        return int(name, 16) % 2 == 1

    def _shown(self, row: int) -> Question:
        pair = self.pairs[row]
        answers = (pair.b, pair.a) if self._swapped(pair.name) else (pair.a, pair.b)
        return Question(pair.name, shown(pair.prompt), *map(shown, answers))

    def answer(self, name: str, choice: str) -> None:
        """Records the answer to the open question. When this returns, it is on the disk.

        Args:
            name: of the question that was shown. choice: a key of `PREFERENCES`, or one of `NO_PREFERENCE`: nothing
                is learned from it, and the question is not asked again.

        Raises:
            NotNow: another question is open, or none.
            OSError: the profile cannot be written, or was changed by another session. The question stays open.
        """
        if self.question is None or name != self.question.name:
            raise NotNow("an answer needs to be to the open question, got one to another, which was answered already")
        answers, skipped = self.profile.answers, self.profile.skipped
        if choice in NO_PREFERENCE:
            self._save(answers, (*skipped, Skipped(name, choice, len(answers))))
            return
        preference, row = PREFERENCES[choice], self.rows[name]
        preference = 1 - preference if self._swapped(name) else preference
        said = Answer(name, tuple(self.features[row].tolist()), preference, *self.pairs[row])
        self._save((*answers, said), skipped)

    def undo(self) -> None:
        """Removes the last answer, or what was skipped after it, on the disk too.

        Raises:
            NotNow: there is none.
            OSError: the profile cannot be written, or was changed by another session. The answer stays.
        """
        answers, skipped = self.profile.answers, self.profile.skipped
        if skipped and skipped[-1].after == len(answers):
            self._save(answers, skipped[:-1])
        elif answers:
            self._save(answers[:-1], skipped)
        else:
            raise NotNow("undo needs an answer to take back, got none yet")

    def _save(self, answers: tuple[Answer, ...], skipped: tuple[Skipped, ...]) -> None:
        profile = Profile.of(self.profile.user, self.profile.fingerprint, answers, self.prior, skipped)
        with locked(self.path):  # else another session could write between our look and our writing
            if content(self.path) != self._content:
                raise OSError(f"{self.path} was changed by another session: close one of them and start again")
            profile.save(self.path)
            self._content = content(self.path)
        self._continue_from(profile)

    def coefficients(self) -> list[Coefficient]:
        """The coefficients (D,) of this user, as far as they are known."""
        mean, usual = self.profile.coefficients, self.prior.mean
        width, usual_width = (DEVIATIONS * np.sqrt(np.diag(of[1])) for of in (self.profile.posterior, self.prior))
        columns = (mean, mean - width, mean + width, usual - usual_width, usual + usual_width)
        return [Coefficient(*row) for row in np.stack(columns, 1).tolist()]

    def forecast(self) -> Forecast | None:
        """What the model expected for the last answer; None before the first.

        The forecast for the open question stays hidden, because people would copy it.
        """
        if not self.profile.answers:
            return None
        *before, last = self.profile.answers
        belief = self.prior
        if before:
            belief = posterior([said.features for said in before], [said.preference for said in before], self.prior)
        chance, preference = float(predict([last.features], belief)[0]), last.preference
        if last.pair in self.rows and self._swapped(last.pair):
            chance, preference = 1 - chance, 1 - preference
        choice = min(PREFERENCES, key=lambda choice: abs(PREFERENCES[choice] - preference))
        return Forecast(choice, chance)

    def ranking(self) -> list[tuple[str, list[Ranked]]]:
        """Answers to a few prompts, best first for this user. Prompts that were not asked about come first."""
        answers = {}
        for row, pair in enumerate(self.pairs):
            for answer, rewards in zip((pair.a, pair.b), self.rewards):
                answers.setdefault(shown(pair.prompt), {})[shown(answer)] = rewards[row]
        asked = [self.pairs[self.rows[said.pair]] for said in self.profile.answers if said.pair in self.rows]
        known = {shown(pair.prompt) for pair in asked}
        prompts = sorted(answers, key=lambda prompt: (prompt in known, -len(answers[prompt])))[:MOST_PROMPTS]
        return [(prompt, rank(answers[prompt], self.profile)[:MOST_ANSWERS]) for prompt in prompts]


def content(path: Path) -> bytes | None:
    """What is in the file; None if there is none. Times and numbers of files are no proof that nothing has changed."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _checked(rewards: np.ndarray, pairs: int, factors: int) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape != (pairs, factors):
        raise ValueError(f"a session needs base rewards of shape {(pairs, factors)}, got {rewards.shape}")
    if not (good := (np.abs(rewards) <= LARGEST_REWARD).all(1)).all():
        row = int(good.argmin())
        raise ValueError(
            f"a session needs finite base rewards, got {rewards[row]} for pair {row}: score the pool again"
        )
    return rewards


def rank(answers: dict[str, np.ndarray], profile: Profile) -> list[Ranked]:
    """Answers to one prompt, best first; each is given with its base rewards (D,)."""
    rewards = np.array([*answers.values()])
    rewards = rewards - rewards.mean(0)  # a reward that all answers share does not rank them
    means = rewards @ profile.coefficients
    deviations = np.sqrt(np.square(rewards @ mean_and_root(profile.posterior)[1]).sum(1))
    ranked = [Ranked(answer, float(m), float(s)) for answer, m, s in zip(answers, means, deviations)]
    return sorted(ranked, key=lambda one: -one.reward)


def profile_name(user: str) -> str:
    """The name of a user's file: no two users share one, and none leads out of the folder.

    Letters, digits and . _ @ + - stay, other characters become their bytes in UTF-8, like %20, and so does . or - at
    the beginning. Of a name that is too long for a file system, its hash is left.
    """
    name = re.sub(r"[^\w.@+-]|^[.@+-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), user)
    if len(name.encode()) > LONGEST_NAME:
        name = f"%sha256-{hashlib.sha256(user.encode()).hexdigest()}"  # no other name has % and an s
    return f"{name}.json"
