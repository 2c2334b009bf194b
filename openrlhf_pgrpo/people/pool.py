"""The pairs that a new user may be asked about, and their base rewards."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.files import check_folder, check_row, whole_file
from openrlhf_pgrpo.models.comparisons import RATINGS, Comparisons, check_draw, form_of, pair_up, read_pairs
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.messages import Text, no_text
from openrlhf_pgrpo.models.ratings import Ratings, read_ratings
from openrlhf_pgrpo.models.scoring import AT_ONCE, MOST_TEXTS, load, texts_of
from openrlhf_pgrpo.models.tables import COLUMNS, Columns, read_table
from openrlhf_pgrpo.progress import along


class Pair(NamedTuple):
    """Two answers to a prompt, each a text or a list of messages; the columns of a pool."""

    prompt: Text
    a: Text
    b: Text

    @property
    def in_order(self) -> "Pair":
        """The same pair, whichever answer comes first."""
        return Pair(self.prompt, *sorted((self.a, self.b), key=_order))

    @property
    def name(self) -> str:
        """A hash of the texts that does not depend on the order of the answers or of the pool."""
        return hashlib.sha256(json.dumps(self.in_order, sort_keys=True).encode()).hexdigest()[:32]


def _order(text: Text) -> tuple[bool, str]:
    return (False, text) if isinstance(text, str) else (True, json.dumps(text, sort_keys=True))


def shown(text: Text) -> str:
    """A text as people read it; messages are paragraphs that begin with their role."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{turn['role']}: {_words(turn)}" for turn in text)


def _words(message: dict) -> str:
    """What a message says; of anything else than words, what it is."""
    content = message["content"]
    if isinstance(content, str):
        return content
    if content is None:  # it calls a tool
        return json.dumps(message["tool_calls"], ensure_ascii=False)
    return "\n".join(str(part.get("text", f"({part['type']})")) for part in content)


def read_pool(
    source: Path,
    columns: Columns = COLUMNS,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
) -> list[tuple[str, Pair]]:
    """The pairs (P,) of `source`, and the place of each, in words.

    Rows hold prompt, a and b, or what `comparisons.read` takes; then it does not matter who preferred what. Pairs of
    two answers that look the same, which nobody can choose between, and repetitions are left out, and their number is
    printed.

    Args:
        columns: of what `comparisons.read` takes, and of the prompt. source, split, pairs_per_user, seed: as there.

    Raises:
        ValueError: a row that is not whole, with its place; or no pair is left.
        OSError: a file cannot be read.
    """
    check_draw(pairs_per_user, seed)
    data, equal = _data_of(source, columns, split)
    found = pair_up(data, pairs_per_user, seed)
    for sentence in found.said:
        print(sentence, flush=True)
    pairs = [Pair(*row[1:4]) for row in found.rows]
    different = [row for row, pair in enumerate(pairs) if shown(pair.a).strip() != shown(pair.b).strip()]
    if not different:
        raise ValueError(f"{source} needs a pair of two different answers, got none in {equal + len(pairs)} rows")
    distinct: dict[str, int] = {}
    for row in different:
        distinct.setdefault(pairs[row].name, row)
    counts = {
        "of equal answers": equal + len(pairs) - len(different),
        "repeated": len(different) - len(distinct),
    }
    if left_out := [f"{count} {what}" for what, count in counts.items() if count]:
        used = f"{len(distinct)} of {equal + len(pairs)} pairs of {source} are used"
        print(f"{used}; left out: {', '.join(left_out)}", flush=True)
    return [(found.places([(row, 0), (row, 1)]), pairs[row]) for row in distinct.values()]


def _data_of(source: Path, columns: Columns, split: str | None) -> tuple[Comparisons | Ratings, int]:
    """The data without the rows of twice the same answer, and the number of these.

    Raises:
        ValueError: as `read_pool`, or no columns of answers.
    """
    table = read_table(source, {}, split)
    there = table.columns
    if {"a", "b"} <= there and columns[2:4] == COLUMNS[2:4]:
        columns = columns._replace(chosen="a", rejected="b")
    form = form_of(table, columns)
    if form == RATINGS:
        return read_ratings(table, columns), 0
    if form is None:
        raise ValueError(
            f"{source} needs the columns 'a' and 'b', or {columns.chosen!r} and {columns.rejected!r}, or "
            f"{columns.response!r} and {columns.rating!r}, got {listed(sorted(there)) or 'none'}: name them with "
            "--chosen_key and --rejected_key"
        )
    prompted = columns.prompt in there or columns.chosen == "a"
    needed = (columns.prompt, columns.chosen, columns.rejected)[not prompted :]
    rows, numbers = [], []
    for number, row in enumerate(table.rows):
        check_row(row, table.place(number), dict.fromkeys(needed, object))
        first, second = row[columns.chosen], row[columns.rejected]
        if first != second or no_text(first):
            rows.append({columns.user: "anybody", **{key: row[key] for key in needed}})
            numbers.append(table.numbers[number])
    kept = table._replace(rows=rows, numbers=numbers)
    return read_pairs(kept, columns, prompted), len(table.rows) - len(rows)


def written_in(
    model: Folder, pairs: Sequence[Pair], place: Callable[[int], str]
) -> tuple[list[Pair], np.ndarray, np.ndarray]:
    """The pairs (P,) as the model writes them; which of them have an answer that is nothing but its end, and which
    have one that is too long for the model, both (P,).

    Args:
        place: says where the pair of a number stands, for a message.

    Raises:
        ValueError: a pair that cannot be written in the model's form, with its place.
    """
    prompts = [pair.prompt for pair in pairs for _ in "ab"]
    answers = [answer for pair in pairs for answer in pair[1:]]
    before, after = model.writer.pairs(prompts, answers, lambda text: place(text // 2))
    wrong = []
    for start in along(range(0, len(before), AT_ONCE), "looking at the texts", "batches"):
        some = slice(start, start + AT_ONCE)
        tokens = model.texts.tokens(before[some], after[some], first=start)
        wrong.append(np.stack([tokens.empty, tokens.too_long]))
    empty, too_long = np.concatenate(wrong, 1).reshape(2, -1, 2).any(2)
    return [*map(Pair, before[::2], after[::2], after[1::2])], empty, too_long


def readable(model: Folder, placed: list[tuple[str, Pair]], source: Path) -> tuple[list[Pair], list[Pair]]:
    """The pairs (P,) of `source` whose answers the model reads whole, as they are and as it writes them; prints how
    many it does not.

    Raises:
        ValueError: a pair that cannot be written in the model's form, or an answer that is nothing but its end, with
            its place; or no pair is left.
    """
    written, empty, too_long = written_in(model, [pair for _, pair in placed], lambda number: placed[number][0])
    if empty.any():
        raise ValueError(
            f"{placed[int(empty.argmax())][0]} needs answers with words, got one that is nothing but its end, in "
            f"{empty.sum()} of {len(placed)} pairs: drop the row, because a reward for saying nothing means nothing"
        )
    if too_long.all():
        raise ValueError(
            f"{source} needs a pair of answers within the {model.max_length} tokens that the model reads, got "
            f"none in {len(placed)} pairs: shorten them, or take a reward model of longer texts"
        )
    if too_long.any():
        print(
            f"{too_long.sum()} of {len(placed)} pairs are left out: they have an answer of more than the "
            f"{model.max_length} tokens that the model reads",
            flush=True,
        )
    kept = [(pair, text) for (_, pair), text, long in zip(placed, written, too_long) if not long]
    return [pair for pair, _ in kept], [text for _, text in kept]


def base_rewards(
    model: Folder,
    written: Sequence[Pair],
    scores: Path | None = None,
    batch_size: int = MOST_TEXTS,
    chat_template: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Base rewards (P, D) of all answers a and of all answers b: from the file `scores` if it exists, else from the
    model, which reads every text once; then the file is written.

    Args:
        written: pairs (P,) as the model writes them. The file belongs to them, because a model from before forms were
            recorded may be told another form. chat_template: as `Folder`.

    Raises:
        ValueError, OSError: as `read_scores` or `scoring.load`, or the file cannot be written.
    """
    if scores is not None and scores.exists():
        return read_scores(scores, written, model.fingerprint)
    if scores is not None:
        check_folder(scores, "--scores")
    print(f"scoring the answers of {len(written)} pairs ...", flush=True)
    texts, numbers = texts_of(written)
    rewards = load(model.name, chat_template=chat_template).of_written(*zip(*texts), batch_size)
    a, b = (rewards[column] for column in numbers.T)
    if scores is not None:
        write_scores(scores, a, b, written, model.fingerprint)
    return a, b


def tell_apart(pairs: list[Pair], a: np.ndarray, b: np.ndarray) -> tuple[list[Pair], np.ndarray, np.ndarray]:
    """The pairs (P,) whose answers differ in base rewards a and b (P, D), with these; prints how many do not.

    The model cannot read the difference of the others, such as one that was cut away, so their answers teach nothing.

    Raises:
        ValueError: none is left.
    """
    differ = (a != b).any(1)
    if not differ.any():
        raise ValueError(f"a pool needs answers that the model tells apart, got none in {len(pairs)} pairs")
    if not differ.all():
        print(f"{(~differ).sum()} of {len(pairs)} pairs are the same to the model and are left out", flush=True)
    return [pair for pair, asked in zip(pairs, differ) if asked], a[differ], b[differ]


def write_scores(path: Path, a: np.ndarray, b: np.ndarray, pairs: Sequence[Pair], fingerprint: str) -> None:
    """Saves the result of `base_rewards`, with the model and the pairs that it belongs to."""
    sides = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}  # others are written in the wrong order
    with whole_file(path) as file:
        file.write(save(sides, _belongs_to(pairs, fingerprint)))


def read_scores(path: Path, pairs: Sequence[Pair], fingerprint: str) -> tuple[np.ndarray, np.ndarray]:
    """The base rewards that `write_scores` saved.

    Raises:
        ValueError: a file of another kind, for another model or pool, or without a finite number for each pair.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, "np") as file:
            found, (a, b) = file.metadata(), map(file.get_tensor, "ab")
    except (SafetensorError, TypeError) as error:  # TypeError: numbers of a kind that numpy lacks
        raise ValueError(f"{path} needs to hold the base rewards of a pool, got {error}: name another file") from error
    for what, needed in _belongs_to(pairs, fingerprint).items():
        if found is None or found.get(what) != needed:
            got = found and found.get(what)
            raise ValueError(f"{path} needs to be for the {what} {needed}, got one for {got}: name another file")
    for side in (a, b):
        if side.ndim != 2 or side.shape != (len(pairs), a.shape[1]) or side.dtype != np.float64:
            raise ValueError(
                f"{path} needs base rewards of {len(pairs)} pairs in float64, got {side.dtype} of shape {side.shape}: "
                "delete it"
            )
        if not np.isfinite(side).all():
            raise ValueError(f"{path} needs finite base rewards, got nan or inf: delete it")
    return a, b


def _belongs_to(pairs: Sequence[Pair], fingerprint: str) -> dict[str, str]:
    model = fingerprint.partition("+")[0]  # the pairs are as they are written, which says all about the form
    return {"model": model, "pool": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()}
