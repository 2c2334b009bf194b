"""Who preferred which of two answers, out of rows as people have them. Three shapes are read:

    pairs           user, prompt, chosen, rejected[, preference]
    conversations   user, chosen, rejected[, preference]: lists of messages; those that both begin with are the prompt
    ratings         user, prompt, response, rating: each two responses of one user to one prompt are a pair

Axes: N comparisons.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.annotations import preference_of
from openrlhf_pgrpo.core.names import in_words, listed, printed_missing, user_in
from openrlhf_pgrpo.files import check_row
from openrlhf_pgrpo.models.messages import (
    Text,
    check_begun,
    check_forms,
    count_shared,
    no_answer,
    no_text,
)
from openrlhf_pgrpo.models.ratings import Ratings, read_ratings
from openrlhf_pgrpo.models.tables import COLUMNS, Columns, Table, read_table

PAIRS, RATINGS = "pairs", "ratings"
COLUMNS_OF = {
    PAIRS: ("user", "prompt", "chosen", "rejected", "preference"),
    RATINGS: ("user", "prompt", "response", "rating"),
}
Row = tuple[str, Text, Text, Text, float]  # user, prompt, first answer, second answer, preference for the first


class Comparisons(NamedTuple):
    """Comparisons, and where they stand.

    Attributes:
        rows: (N,). of: (N, 2) rows of the table of the first and the second answer, the same unless they are ratings.
        said: what is worth a sentence, though nothing is wrong.
    """

    table: Table
    rows: list[Row]
    of: np.ndarray
    said: list[str]

    def select(self, mask: np.ndarray) -> "Comparisons":
        """Some of the comparisons."""
        return self._replace(rows=[self.rows[row] for row in np.flatnonzero(mask)], of=self.of[mask])

    def places(self, answers: Iterable[tuple[int, int]]) -> str:
        """Where answers stand, each as the number of its comparison and 0 or 1; for a message."""
        return self.table.places(sorted({int(self.of[answer]) for answer in answers}))

    def names(self, column: str, who: str) -> list[str]:
        """The names (N,) in a column, such as the preference group of the user; `who` is whose they are.

        Raises:
            ValueError: a row without a name, or ratings of one pair with two.
        """
        names = [user_in(row, column, self.table.place(number), who) for number, row in enumerate(self.table.rows)]
        for pair in map(sorted, self.of.tolist()):
            first, second = (names[row] for row in pair)
            if first != second:
                raise ValueError(
                    f"two ratings of one pair need one {who} in {column!r}, got {first!r} and {second!r} in "
                    f"{self.table.places(pair)}: give a user the same one in all rows"
                )
        return [names[row] for row in self.of[:, 0]]


def read(
    source: str | Path,
    columns: Columns = COLUMNS,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
) -> Comparisons:
    """The comparisons in the data; prompts and answers are texts or lists of messages.

    Args:
        source, split: as `tables.read_table`. pairs_per_user, seed: of ratings, as `Ratings.draw`.

    Raises:
        ValueError: as `read_data` and `pair_up`.
    """
    check_draw(pairs_per_user, seed)
    found = pair_up(read_data(source, columns, split), pairs_per_user, seed)
    users, prompts, *answers, _ = zip(*found.rows)
    for what, values in (("a user", users), ("a prompt", prompts), ("an answer", [*answers[0], *answers[1]])):
        if rows := printed_missing(values):
            found.said.append(
                f"warning: {values[rows[0]]!r} is {what} like any other in {len(rows)} places, though programs write "
                "it where a value is missing: if it is, drop these rows"
            )
    return found


def read_data(source: str | Path, columns: Columns = COLUMNS, split: str | None = None) -> Comparisons | Ratings:
    """The data, before ratings are made pairs.

    Raises:
        ValueError: as `tables.read_table` and `read_ratings`; of pairs, a row without a user, or without a text or
            messages as prompt or answer; a preference that is not a number from 0 to 1, or missing though other rows
            have one; answers that are the same; conversations that do not part at an answer; with rows.
    """
    table = read_table(source, {}, split, [columns.preference, "margin"])  # the host trains on margins
    form = form_of(table, columns)
    if form == PAIRS:
        return read_pairs(table, columns, columns.prompt in table.columns)
    if form == RATINGS:
        return read_ratings(table, columns)
    raise ValueError(
        f"{table.place(0)} needs the column {columns.chosen!r}, of pairs, or {columns.rating!r}, of ratings, got "
        f"{listed(table.rows[0]) or 'none'}: name it with --chosen_key or --rating_key"
    )


def form_of(table: Table, columns: Columns) -> str | None:
    """What the rows are: PAIRS, RATINGS, or neither, None.

    Raises:
        ValueError: a column that is named otherwise than by default, and that no row has, or rows of this form do not.
    """
    found = table.columns
    form = PAIRS if columns.chosen in found else RATINGS if columns.rating in found else None
    for kind, name in columns._asdict().items():
        if name == getattr(COLUMNS, kind):
            continue
        if name not in found:
            raise ValueError(
                f"--{kind}_key needs a column of {table.name}, {listed(sorted(found))}, got {name!r}: correct it"
            )
        if form is not None and kind not in COLUMNS_OF[form]:
            other = RATINGS if form == PAIRS else PAIRS
            raise ValueError(
                f"--{kind}_key names a column of {other}, got {table.name}, whose rows are {form}, so it does "
                "nothing: leave it out"
            )
    return form


def pair_up(data: Comparisons | Ratings, pairs_per_user: int | None, seed: int) -> Comparisons:
    """The comparisons; those of ratings are made here. A higher rating is preferred, equal ones are a tie.

    Raises:
        ValueError: as `Ratings.draw`; pairs are to be drawn of what are pairs already; or the form of the texts tells
            which answer was chosen, or all answers repeat their prompt.
    """
    found = _paired(data, pairs_per_user, seed)
    _, prompts, first, second, preferences = zip(*found.rows) if found.rows else ((),) * 5
    check_forms(first, second, preferences, found.table.name)

    def places(pairs: Sequence[int]) -> str:
        return found.places((pair, side) for pair in pairs for side in (0, 1))

    return found._replace(said=found.said + check_begun(prompts, first, second, places=places))


def _paired(data: Comparisons | Ratings, pairs_per_user: int | None, seed: int) -> Comparisons:
    if isinstance(data, Comparisons):
        if pairs_per_user is not None:
            raise ValueError(
                f"--pairs draws pairs of ratings, got {data.table.name}, whose rows are pairs already, so it does "
                "nothing: leave it out"
            )
        return data
    first, second = data.draw(pairs_per_user, seed)
    preference = np.where(data.rating[first] == data.rating[second], 0.5, 1.0)
    numbers = data.user[first], data.prompt[first], data.response[first], data.response[second]
    rows = [
        (data.users[user], data.prompts[prompt], data.responses[one], data.responses[other], weight)
        for user, prompt, one, other, weight in zip(*(column.tolist() for column in (*numbers, preference)))
    ]
    said = [*data.said(), f"{len(data.user)} ratings make {len(rows)} pairs"]
    return Comparisons(data.table, rows, np.stack([data.row[first], data.row[second]], 1), said)


def check_draw(pairs_per_user: int | None, seed: int) -> None:
    """Raises ValueError unless this many pairs can be drawn with this seed."""
    if pairs_per_user is not None and pairs_per_user < 1:
        raise ValueError(f"--pairs needs at least 1, got {pairs_per_user}")
    if seed < 0:
        raise ValueError(f"--seed needs a number of at least 0, got {seed}")


def read_pairs(table: Table, columns: Columns, prompted: bool) -> Comparisons:
    """Pairs; unless `prompted`, there is no column of prompts, and conversations hold them."""
    answers = (columns.chosen, columns.rejected)
    texts = (columns.prompt, *answers) if prompted else answers
    for number, row in enumerate(table.rows):
        check_row(row, table.place(number), dict.fromkeys((columns.user, *texts), object))
    weighed = any(columns.preference in row for row in table.rows)
    rows: list[Row] = []
    same = []
    for number, row in enumerate(table.rows):
        place = table.place(number)
        user = user_in(row, columns.user, place)
        given = row.get(columns.preference) if weighed else 1.0
        try:
            preference = preference_of(given)
        except ValueError as error:
            need = f"a number from 0 (rejected) to 1 (chosen) in {columns.preference!r}"
            got = "null" if given is None else f"{repr(given)[:80]}"
            raise ValueError(f"{place} needs {need}, got {got}: correct it or drop the row") from error
        for column in texts:
            if wrong := no_text(row[column]):
                raise ValueError(f"{place} needs a text in {column!r}, got {wrong}: correct it or drop the row")
        first, second = (row[column] for column in answers)
        if first == second:
            same.append(number)
            continue
        prompt = row[columns.prompt] if prompted else None
        if prompt is None or _begins(first, prompt) or _begins(second, prompt):
            prompt, first, second = _parted(prompt, first, second, columns, place)
        for column, answer in zip(answers, (first, second)):
            if wrong := no_answer(answer):
                raise ValueError(f"{place} needs an answer in {column!r}, got {wrong}: correct it or drop the row")
        rows.append((user, prompt, first, second, preference))
    if same:
        raise ValueError(
            f"every pair needs two answers that differ, got the same text twice in {table.places(same)}: drop "
            f"{'them' if len(same) > 1 else 'it'}, because no base reward can tell such answers apart"
        )
    return Comparisons(table, rows, np.repeat(np.arange(len(rows))[:, None], 2, 1), [])


# ---- conversations --------------------------------------------------------------------------------------------------


def _begins(answer: Text, prompt: Text) -> bool:
    """Whether an answer is a whole conversation, which holds the prompt. Instructions to the model may come first."""
    if not isinstance(answer, list):
        return False
    if isinstance(prompt, list):
        return count_shared(answer, prompt) == len(prompt)
    turn = next((turn for turn in answer if turn["role"] != "system"), {"role": "", "content": ""})
    return turn["role"] == "user" and isinstance(turn["content"], str) and turn["content"].strip() == prompt.strip()


def _parted(
    prompt: Text | None, first: Text, second: Text, columns: Columns, place: str
) -> tuple[list[dict], list[dict], list[dict]]:
    """The messages that two conversations share, and the rest of each.

    Raises:
        ValueError: there is nothing before or after where they part, or they part at the words of the user.
    """
    both = f"{columns.chosen!r} and {columns.rejected!r}"
    for column, answer in ((columns.chosen, first), (columns.rejected, second)):
        if prompt is not None and not _begins(answer, prompt):
            raise ValueError(
                f"{place} needs conversations that begin with the prompt in {both}, or answers alone, got one that "
                f"does not begin with it in {column!r}: correct it or drop the row"
            )
        if not isinstance(answer, list):
            raise ValueError(
                f"{place} needs the column {columns.prompt!r}, or lists of messages that hold the prompt in {both}, "
                f"got no prompt and {in_words(answer)} in {column!r}: name the column of prompts with --prompt_key, "
                "or write each dialogue as a list of messages, {'role': ..., 'content': ...}"
            )
    assert isinstance(first, list) and isinstance(second, list)
    shared = count_shared(first, second)
    if not shared:
        raise ValueError(
            f"{place} needs conversations in {both} that begin with the same messages, which are the prompt, got "
            "ones whose first messages differ: correct it or drop the row"
        )
    rests = first[shared:], second[shared:]
    if not all(rests):
        raise ValueError(
            f"{place} needs an answer behind the messages that {both} share, got a conversation that is the "
            "beginning of the other: complete it or drop the row"
        )
    if wrong := no_answer(rests[0]) or no_answer(rests[1]):
        raise ValueError(
            f"{place} needs conversations in {both} that part at an answer, got {wrong}: correct it or drop the row"
        )
    return first[:shared], *rests
