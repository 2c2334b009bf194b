"""Data as people have them, written as the pairs that every trainer and `evaluate` read; some of them held out.

Axes: N comparisons or ratings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openrlhf_pgrpo.core.names import Names, listed, name_of
from openrlhf_pgrpo.files import check_distinct, check_folder, data_in, write_rows
from openrlhf_pgrpo.models.comparisons import Comparisons, check_draw, pair_up, read_data
from openrlhf_pgrpo.models.messages import Text
from openrlhf_pgrpo.models.ratings import Ratings, text_key
from openrlhf_pgrpo.models.tables import COLUMNS, Columns, Table, as_json

KINDS = ("users", "prompts", "responses")  # of what can be held out
WRITTEN = ("user", "prompt", "chosen", "rejected", "preference")


def write_pairs(
    data: Path,
    output: Path,
    columns: Columns = COLUMNS,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
    hold_out: Sequence[str] = (),
    held_out: Path | None = None,
    messages: bool = False,
) -> list[str]:
    """Writes pairs as JSONL, and says how many of what.

    Args:
        data, columns, split, pairs_per_user, seed: as `comparisons.read`. hold_out: as `shares_of`. With several
            kinds, `held_out` gets what all of them hold out, `output` what none does; the rest is left out. Ratings
            are parted before they are made pairs. seed: also of what is held out. messages: write texts as messages,
            as trainers need them with --data.apply_chat_template.

    Raises:
        ValueError: arguments or files that do not fit, or a file that would stay empty; nothing has been written yet.
        OSError: a file cannot be read or written.
    """
    shares = shares_of(hold_out)
    check_draw(pairs_per_user, seed)
    if bool(shares) != (held_out is not None):
        raise ValueError("--hold_out and --held_out need each other, got only one of them: add the other")
    check_distinct({"--data": data, "--output": output, "--held_out": held_out})
    for flag, file in (("--output", output), ("--held_out", held_out)):
        if file is not None:
            check_folder(file, flag, data_in(data, "--data"))
    read = read_data(data, columns, split)
    parts, lines = {output: read}, []
    if held_out is not None:
        training, held = parted(read, shares, seed)
        left = int((~training & ~held).sum())
        for flag, some in (("--output", training), ("--held_out", held)):
            if not some.any():
                raise ValueError(
                    f"--hold_out {' '.join(hold_out)} needs rows for both files, got none for {flag}: {left} of "
                    f"{len(some)} belong to neither. Change the shares"
                )
        parts = {output: read.select(training), held_out: read.select(held)}
        if left:
            what = "ratings" if isinstance(read, Ratings) else "pairs"
            lines.append(f"{left} of {len(held)} {what} are left out, because only a part of them is held out")
    of_ratings = isinstance(read, Ratings)
    kept, dropped = carried(read.table, columns, of_ratings)
    if dropped:
        why = "those with one value for each user are kept" if of_ratings else "others are written under these names"
        lines.append(f"columns left out: {listed(dropped)}; {why}")
    made = {}
    for path, part in parts.items():
        try:
            made[path] = pair_up(part, pairs_per_user, seed)
        except ValueError as error:
            if held_out is None or not of_ratings:
                raise
            raise ValueError(f"--hold_out leaves too little for {path}: {error}") from error
    rows = {path: rows_of(comparisons, kept, messages) for path, comparisons in made.items()}
    for path, comparisons in made.items():
        write_rows(path, rows[path])
        lines += [*comparisons.said, f"{path}: {counted(comparisons)}"]
    return lines


def shares_of(hold_out: Sequence[str]) -> dict[str, float]:
    """Kind -> share of texts such as "users:0.2".

    Raises:
        ValueError: another kind, no share between 0 and 1, or a kind twice.
    """
    shares: dict[str, float] = {}
    for word in hold_out:
        kind, _, share = word.partition(":")
        try:
            number = float(share)
        except ValueError:
            number = 0.0
        if kind not in KINDS or not 0 < number < 1:
            raise ValueError(
                f"--hold_out needs {listed(KINDS)} and a share between 0 and 1, such as users:0.2, got {word!r}: "
                "correct it"
            )
        if kind in shares:
            raise ValueError(f"--hold_out needs each kind once, got {kind!r} twice: leave one of them out")
        shares[kind] = number
    return shares


def parted(data: Comparisons | Ratings, shares: dict[str, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which comparisons or ratings (N,) are for training, and which are held out: no part of the former is held out by
    any kind, and all of the latter by every kind.

    What is drawn of a kind depends on the seed alone, not on the other kinds or the order of rows.

    Raises:
        ValueError: a share that leaves one side empty.
    """
    training, held = np.ones((2, len(data.rows) if isinstance(data, Comparisons) else len(data.row)), bool)
    for kind, share in shares.items():
        values = parts_of(data, kind)
        distinct = np.unique(values)
        count = round(share * len(distinct))
        if not 0 < count < len(distinct):
            raise ValueError(
                f"--hold_out {kind}:{share:g} needs {kind} on both sides, got {count} of {len(distinct)} held out: "
                "change the share, or hold out something else"
            )
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        drawn = np.isin(values, rng.choice(distinct, count, replace=False))
        training &= ~drawn.any(0)
        held &= drawn.all(0)
    return training, held


def parts_of(data: Comparisons | Ratings, kind: str) -> np.ndarray:
    """(1, N) numbers of the users or prompts, or of the responses; of pairs there are two, (2, N). A response is its
    text, whatever prompt it answers. Numbers are in the order of names or texts."""
    if isinstance(data, Ratings):
        return {"users": data.user, "prompts": data.prompt, "responses": data.response}[kind][None]
    users, *texts, _ = zip(*data.rows)
    prompts, *answers = ([*map(text_key, column)] for column in texts)
    columns = {"users": [users], "prompts": [prompts], "responses": answers}[kind]
    names = Names(sorted({name for column in columns for name in column}))
    return np.stack([names.rows(column) for column in columns])


def carried(table: Table, columns: Columns, of_ratings: bool) -> tuple[list[str], list[str]]:
    """The other columns that pairs keep, and those that they do not.

    A pair of two ratings keeps what has one value for each user, such as a preference group. A column is not kept
    whose name is that of another one that is written.
    """
    read = (columns.user, columns.prompt, columns.response, columns.rating) if of_ratings else columns[:5]
    kept, dropped = [], []
    users = [name_of(row[columns.user]) for row in table.rows] if of_ratings else []
    for column in dict.fromkeys(column for row in table.rows for column in row):
        if column in read:
            continue
        values = [row.get(column) for row in table.rows]
        right = column not in WRITTEN and (not of_ratings or _one_each(users, values))
        (kept if right else dropped).append(column)
    return kept, dropped


def _one_each(users: Sequence[str], values: Sequence[Any]) -> bool:
    first: dict[str, Any] = {}
    return all(first.setdefault(user, value) == value for user, value in zip(users, values))


def rows_of(comparisons: Comparisons, kept: Sequence[str], messages: bool) -> list[dict]:
    """Rows to write; with `messages`, a prompt that is a text is a message of the user's, an answer the assistant's.

    Raises:
        ValueError: a value of a column that is kept has no form in JSON.
    """
    table, rows = comparisons.table, []
    for pair, number in zip(comparisons.rows, comparisons.of[:, 0].tolist()):
        if messages:
            user, prompt, *answers, preference = pair
            pair = (user, said_by("user", prompt), *(said_by("assistant", answer) for answer in answers), preference)
        its, place = table.rows[number], table.place(number)
        others = {column: as_json(its[column], column, place) for column in kept if column in its}
        rows.append(dict(zip(WRITTEN, pair)) | others)
    return rows


def said_by(role: str, text: Text) -> list[dict]:
    """A text as one message of a role; messages stay as they are."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def counted(comparisons: Comparisons) -> str:
    users, prompts, *_, preferences = zip(*comparisons.rows)
    return (
        f"{len(set(users))} users, {len({*map(text_key, prompts)})} prompts, {len(preferences)} pairs, "
        f"{preferences.count(0.5)} ties"
    )
