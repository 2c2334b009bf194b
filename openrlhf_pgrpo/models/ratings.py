"""Ratings of responses, turned into pairs: each two responses of one user to one prompt are a pair.

The pairs of a user are numbered, prompt after prompt, and those of a prompt as a triangle: 01, 02, 12, 03, 13, ... So
some of them can be drawn without a list of all.

Axes: R ratings, U users, B blocks (the ratings of one user of one prompt), N pairs.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from openrlhf_pgrpo.core.names import Names, in_words, listed, user_in
from openrlhf_pgrpo.files import check_row
from openrlhf_pgrpo.models.messages import Text, no_answer, no_text
from openrlhf_pgrpo.models.tables import Columns, Table

ROUNDED = 2**53  # from here on, whole numbers that differ may be the same float
MOST_PAIRS = 10**7  # of all users: more would fill the memory


class Ratings(NamedTuple):
    """Who rated which response to which prompt how: each user, prompt and response once, in this order.

    The order comes from names and texts, so nothing that is drawn depends on the order of the rows.

    Attributes:
        users, prompts, responses: distinct, sorted. user, prompt, response: (R,) rows of these. rating: (R,).
        row: (R,) rows of the table. times: (R,) how often each was given; the rating is the mean.
    """

    table: Table
    users: list[str]
    prompts: list[Text]
    responses: list[Text]
    user: np.ndarray
    prompt: np.ndarray
    response: np.ndarray
    rating: np.ndarray
    row: np.ndarray
    times: np.ndarray

    def select(self, mask: np.ndarray) -> "Ratings":
        """Some of the ratings."""
        columns = ("user", "prompt", "response", "rating", "row", "times")
        return self._replace(**{name: getattr(self, name)[mask] for name in columns})

    def draw(self, pairs_per_user: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """First and second rating (N,) of pairs, as rows of the R: the higher rating comes first.

        Args:
            pairs_per_user: how many to draw of each user, without replacement; who has fewer gives all. None is all.

        Raises:
            ValueError: no pair, only ties, or more pairs than MOST_PAIRS.
        """
        starts = _starts(self.user, self.prompt)
        sizes = np.diff(np.append(starts, len(self.user)))
        each = sizes * (sizes - 1) // 2
        ends = np.cumsum(each)
        blocks = _starts(self.user[starts])  # the first block of each user
        begins, totals = (ends - each)[blocks], np.add.reduceat(each, blocks)
        counts = totals if pairs_per_user is None else np.minimum(totals, pairs_per_user)
        if not counts.any():
            raise ValueError(
                "ratings need a user who rated two different responses to one prompt, got none among "
                f"{len(self.user)} ratings of {len(blocks)} users in {self.table.name}: add ratings, or look whether "
                "the columns are the right ones"
            )
        if counts.sum() > MOST_PAIRS:
            raise ValueError(
                f"ratings need to make at most {MOST_PAIRS:,} pairs, got {counts.sum():,} of {len(blocks)} users in "
                f"{self.table.name}: draw fewer of each user with --pairs"
            )
        if pairs_per_user is None:
            numbers = np.arange(ends[-1])
        else:
            rng = np.random.default_rng(seed)
            drawn = [_some(rng, *given, pairs_per_user) for given in zip(begins.tolist(), totals.tolist())]
            numbers = np.concatenate(drawn)
        block = np.searchsorted(ends, numbers, side="right")
        low, high = _of_triangle(numbers - (ends - each)[block])
        first, second = starts[block] + low, starts[block] + high
        turned = self.rating[second] > self.rating[first]
        first, second = np.where(turned, second, first), np.where(turned, first, second)
        if (self.rating[first] == self.rating[second]).all():
            raise ValueError(
                f"ratings need two that differ of one user to one prompt, got only ties in {len(first)} pairs of "
                f"{self.table.name}: add ratings, because ties alone do not tell what anybody prefers"
            )
        return first, second

    def without_pairs(self) -> list[str]:
        """The users who rated no two responses to one prompt."""
        second = np.flatnonzero((np.diff(self.user) == 0) & (np.diff(self.prompt) == 0))
        alone = np.setdiff1d(self.user, self.user[second])
        return [self.users[row] for row in alone]

    def said(self) -> list[str]:
        """What is worth a sentence, though nothing is wrong."""
        found = []
        if repeated := int((self.times > 1).sum()):
            found.append(f"{repeated} responses were rated more than once by one user: the mean counts")
        if alone := self.without_pairs():
            found.append(f"{len(alone)} users rated no two responses to one prompt and are left out: {listed(alone)}")
        return found


def read_ratings(table: Table, columns: Columns) -> Ratings:
    """The ratings in a table; prompts and responses are texts or lists of messages.

    Raises:
        ValueError: a row without user, prompt, response or rating, or with a rating that is no finite number; with
            its row.
    """
    needed = dict.fromkeys((columns.user, columns.prompt, columns.response, columns.rating), object)
    names, ratings = [], np.empty(len(table.rows))
    texts: tuple[list[Text], list[Text]] = ([], [])
    right: set[str] = set()  # texts that have been looked at: there are few different ones
    for number, row in enumerate(table.rows):
        place = table.place(number)
        check_row(row, place, needed)
        names.append(user_in(row, columns.user, place))
        for column, found, why_not in zip((columns.prompt, columns.response), texts, (no_text, no_answer)):
            text = row[column]
            if not isinstance(text, str) or text not in right:
                if wrong := why_not(text):
                    raise ValueError(f"{place} needs a text in {column!r}, got {wrong}: correct it or drop the row")
                if isinstance(text, str):
                    right.add(text)
            found.append(text)
        ratings[number] = _number(row[columns.rating], columns.rating, place)
    users = Names(sorted(set(names)))
    user = users.rows(names)
    (prompts, prompt), (responses, response) = map(_distinct, texts)
    order = np.lexsort((response, prompt, user))
    user, prompt, response, ratings = (column[order] for column in (user, prompt, response, ratings))
    starts = _starts(user, prompt, response)
    counts = np.diff(np.append(starts, len(user)))
    mean = ratings[starts]
    for place in np.flatnonzero(counts > 1):  # exactly: whether two responses are a tie may hang on the last bit
        mean[place] = statistics.mean(ratings[starts[place] : starts[place] + counts[place]].tolist())
    rows = np.minimum.reduceat(order, starts)
    kept = user[starts], prompt[starts], response[starts]
    return Ratings(table, list(users), prompts, responses, *kept, mean, rows, counts)


def text_key(text: Text) -> str:
    """A text that two prompts or answers share if they are the same text or messages."""
    return text if isinstance(text, str) else "\0" + json.dumps(text, sort_keys=True, default=str)


def _distinct(texts: Sequence[Text]) -> tuple[list[Text], np.ndarray]:
    """The distinct texts, sorted, and the row of each text (R,) among them."""
    keys = [text_key(text) for text in texts]
    found = dict(zip(keys, texts))
    names = Names(sorted(found))
    return [found[key] for key in names], names.rows(keys)


def _number(value: Any, column: str, place: str) -> float:
    """A rating. In CSV it is a text."""
    try:
        no_number = isinstance(value, (bool, np.bool_)) or "_" in str(value)  # 1_000 is a number to Python alone
        number = np.nan if no_number else float(value)
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(
            f"{place} needs a finite number in {column!r}, got {in_words(value)}: correct it or drop the row"
        )
    if abs(number) >= ROUNDED:
        raise ValueError(
            f"{place} needs a rating below 2**53 in {column!r}, got {in_words(value)}: divide all ratings by one "
            "number, because larger ones that differ may be rounded to a tie"
        )
    return number


def _starts(*columns: np.ndarray) -> np.ndarray:
    """Where sorted columns (R,) have another value in one of them than in the row before."""
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([np.diff(column) != 0 for column in columns], axis=0)
    return np.flatnonzero(new)


def _some(rng: np.random.Generator, begin: int, total: int, count: int) -> np.ndarray:
    """So many of the numbers begin ... begin + total - 1, in order."""
    if total <= count:
        return np.arange(begin, begin + total)
    return begin + np.sort(rng.choice(total, count, replace=False, shuffle=False))


def _of_triangle(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs low < high with these numbers: number = high (high - 1) / 2 + low."""
    high = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    high -= high * (high - 1) // 2 > number  # the root may be rounded
    high += high * (high + 1) // 2 <= number
    return number - high * (high - 1) // 2, high
