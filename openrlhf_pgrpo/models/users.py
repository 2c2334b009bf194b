"""Whose coefficients? The one place that knows trained users, new users with a profile, and the average user.

Axes: U users, D base rewards, B names that are looked up.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openrlhf_pgrpo.core.names import Names, listed
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.models.profiles import Profile

if TYPE_CHECKING:  # importing it takes seconds, and flags import this file
    from openrlhf_pgrpo.models.folder import Folder

ASK = "ask them with openrlhf-pgrpo elicit and give their profile with --profile"
ERROR, MEAN = "error", "mean"  # for an unknown user: an error, or the average user
OF_AVERAGE = "the rewards are the average user's"
MOST_FAULTS = 20  # profiles that one error names


class Users:
    """The trained users of a model, and new users by their profiles.

    Args:
        profiles: files, or folders of them (*.json).
        remedies: what the error about an unknown user says to do.

    Attributes:
        names: (U,) the trained users in the order of rows, then the new ones. coefficients: (U, D).
        average: (D,) mean of the trained users. profiles: those of the new users.

    Raises:
        ValueError: profiles that `Profile.load` refuses, of a user who is known already, or files without an answer;
            all are named. In a folder, those without an answer are counted in a sentence, and their users are unknown.
        OSError: a profile cannot be read.
    """

    def __init__(self, model: "Folder", profiles: Iterable[Path] = (), remedies: str = ASK):
        self.model, self.remedies = model, remedies
        self.profiles: list[Profile] = []
        self.names = Names(model.users)
        faults, silent = [], []
        files = [(path, Path(given).is_dir()) for given in profiles for path in profile_files(given)]
        paths = [path for path, _ in files]
        loaded = Profile.load_all(paths, model.fingerprint, Prior.of(model.coefficients)) if files else []
        for (path, in_folder), profile in zip(files, loaded):
            try:
                if isinstance(profile, ValueError):
                    raise profile
                if profile.answers:
                    self._add(profile, path)
                elif in_folder:
                    silent.append(profile.user)
                else:
                    raise ValueError(_no_answer(path, profile))
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise all_faults(faults)
        if silent:
            who = "users count as unknown, because their profiles have no answer yet"
            print(f"{who}: {len(silent)} ({listed(silent)})", flush=True)
        self.coefficients = np.vstack([model.coefficients, *(profile.coefficients for profile in self.profiles)])
        self.average = model.coefficients.mean(0)

    def _add(self, profile: Profile, path: Path) -> None:
        if profile.user in self.names:
            raise ValueError(f"{path} needs to be of a new user, got {profile.user!r}, who is known: leave it out")
        self.names.rows([profile.user])
        self.profiles.append(profile)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, user: object) -> bool:
        return user in self.names

    def of(self, users: Sequence[str | None], unknown: str = ERROR, subject: str = "every sample") -> np.ndarray:
        """The coefficients (B, D) of users (B,). None is an unknown user.

        Raises:
            ValueError: an unknown user, unless `unknown` is MEAN. The message begins with `subject`.
        """
        rows = self.names.find(users)
        if unknown == ERROR and (rows < 0).any():
            self.check(users, subject)
        return np.vstack([self.coefficients, self.average])[rows]  # row -1 is the last one

    def check(self, users: Sequence[str | None], subject: str) -> None:
        """Raises the ValueError of `of` if one of the users is unknown."""
        if lost := [user for user in users if user not in self]:
            count = f" ({len(lost)} of {len(users)} samples)" if len(users) > 1 else ""
            raise ValueError(
                f"{subject} needs one of the {len(self)} users of {self.model.name} and its profiles, got "
                f"{lost[0]!r}{count}: {self.remedies}"
            )


def coefficients_for(
    model: "Folder", user: str | None, profile: Path | None, unknown: str = ERROR, remedies: str = ASK
) -> np.ndarray:
    """The coefficients (D,) in the file of a profile, else of a trained user. Says so if MEAN makes them the average
    user's instead.

    Raises:
        ValueError: an unknown user, or a profile without an answer, unless `unknown` is MEAN; or as `Profile.load`.
        OSError: the profile cannot be read.
    """
    if profile is not None:
        loaded = Profile.load(profile, model.fingerprint, Prior.of(model.coefficients))
        if not loaded.answers and unknown == ERROR:
            raise ValueError(_no_answer(profile, loaded))
        if not loaded.answers:
            print(f"{OF_AVERAGE}: {profile} has no answer of {loaded.user!r}", flush=True)
        return loaded.coefficients
    if unknown == MEAN and user is not None and user not in model.users:
        print(f"{OF_AVERAGE}: {user!r} is none of the {len(model.users)} users of {model.name}", flush=True)
    return Users(model, remedies=remedies).of([user], unknown, "--user")[0]


def _no_answer(path: Path, profile: Profile) -> str:
    return (
        f"{path} needs an answer of {profile.user!r}, got none, so the coefficients are the average user's: ask them "
        "with openrlhf-pgrpo elicit"
    )


def all_faults(faults: Iterable[str]) -> ValueError:
    """One error for all, so that a folder is mended in one go."""
    faults = list(faults)
    more = f"\nand {len(faults) - MOST_FAULTS} more" * (len(faults) > MOST_FAULTS)
    return ValueError("\n".join(faults[:MOST_FAULTS]) + more)


def profile_files(path: Path) -> list[Path]:
    """The file, or those of the folder; hidden ones are leftovers of editors and of file systems.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    found = sorted(file for file in path.glob("*.json") if file.name[0] != ".") if path.is_dir() else [path]
    if not found or not path.exists():
        raise ValueError(
            f"profiles need a file, or a folder with *.json files, got {path}: correct it or leave it out"
        )
    return found
