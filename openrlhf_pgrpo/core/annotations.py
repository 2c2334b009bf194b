"""Who preferred what: the data of a factorization.

Axes: U users, P pairs, N annotations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.names import Names, in_words, listed


def preference_of(value: Any) -> float:
    """The preference for the first answer of a pair in a row of data: 1 prefers it, 0 the second, 0.5 is a tie.

    Raises:
        ValueError: the value is no number from 0 to 1; true and false are none, because they do not say of which
            answer. The message says in a few words what the value is.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(in_words(value))
    return float(value)


@dataclass(frozen=True)
class Annotations:
    """Who preferred what: N answers of U users to pairs.

    Args:
        user: (N,) rows of `users`. pair: (N,) rows of the pair matrix. preference: (N,) from 0 to 1: 1 if the first
            answer of the pair was preferred, 0 if the second, 0.5 for a tie, anything between for a soft label.
        users: (U,) names.

    Raises:
        ValueError: sizes that differ, a preference or row out of range, a name that appears twice, or a user without
            pairs.
    """

    user: np.ndarray
    pair: np.ndarray
    preference: np.ndarray
    users: Sequence[str]

    def __post_init__(self):
        columns = {name: np.asarray(getattr(self, name)) for name in ("user", "pair", "preference")}
        shapes = [column.shape for column in columns.values()]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ValueError(f"annotations need user, pair and preference of one length above 0, got shapes {shapes}")
        for name in ("user", "pair"):
            if columns[name].dtype.kind not in "iu":
                raise ValueError(f"annotations need row numbers as {name}, got {columns[name].dtype}")
            columns[name] = columns[name].astype(np.int64)
        columns["preference"] = columns["preference"].astype(np.float64)
        for name, value in {**columns, "users": list(self.users)}.items():
            object.__setattr__(self, name, value)
        good = (self.preference >= 0) & (self.preference <= 1)
        if not good.all():
            row = np.argmin(good)
            raise ValueError(f"annotation {row} needs a preference from 0 to 1, got {self.preference[row]}")
        if self.pair.min() < 0:
            raise ValueError(f"annotation {self.pair.argmin()} needs a row of the pairs, got {self.pair.min()}")
        if len(set(self.users)) < len(self.users):
            raise ValueError(f"users need different names, got {len(self.users)} with {len(set(self.users))} names")
        if self.user.min() < 0 or self.user.max() >= len(self.users):
            wrong = self.user.min() if self.user.min() < 0 else self.user.max()
            raise ValueError(f"annotations need one of {len(self.users)} users, got row {wrong}")
        without = np.flatnonzero(np.bincount(self.user, minlength=len(self.users)) == 0)
        if len(without):
            raise ValueError(
                f"every user needs pairs, got none of {listed([self.users[row] for row in without])}: leave them out, "
                "and learn their coefficients later, as those of new users"
            )

    @classmethod
    def of(cls, names: Sequence[str], pair: np.ndarray, preference: np.ndarray) -> "Annotations":
        """Annotations from the name of the user who gave each (N,). The rows of users are in alphabetical order."""
        users = Names(sorted(set(names)))
        return cls(users.rows(names), pair, preference, list(users))

    def __len__(self) -> int:
        return len(self.user)

    def select(self, rows: np.ndarray) -> "Annotations":
        """Some of the annotations (row numbers or mask), of the same users."""
        return Annotations(self.user[rows], self.pair[rows], self.preference[rows], self.users)
