"""The pairs that a new user may be asked about, and their base rewards."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from openrlhf_pgrpo.files import read_rows, whole_file
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.messages import Text, no_text
from openrlhf_pgrpo.models.scoring import RewardModel


class Pair(NamedTuple):
    """Two answers to a prompt, each a text or a list of messages; the columns of a pool."""

    prompt: Text
    a: Text
    b: Text

    @property
    def name(self) -> str:
        """A hash of the texts that does not depend on the order of the answers or of the pool."""
        text = json.dumps([self.prompt, *sorted((self.a, self.b), key=_order)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


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


def read_pool(path: Path) -> list[tuple[int, Pair]]:
    """The pairs (P,) of a JSONL file with the columns prompt, a and b, and their lines.

    Pairs of two answers that look the same, which nobody can choose between, and repetitions are left out, and their
    number is printed.

    Raises:
        ValueError: a row that is not whole, with its line; or no pair is left.
        OSError: the file cannot be read.
    """
    rows = []
    for number, row in read_rows(path, dict.fromkeys(Pair._fields, object)):
        for key in Pair._fields:
            if wrong := no_text(row[key]):
                raise ValueError(
                    f"line {number} of {path} needs a text or messages as {key!r}, got {wrong}: correct it or drop "
                    "the row"
                )
        rows.append((number, Pair(*(row[key] for key in Pair._fields))))
    different = [(number, pair) for number, pair in rows if shown(pair.a).strip() != shown(pair.b).strip()]
    if not different:
        raise ValueError(f"{path} needs a pair of two different answers, got none in {len(rows)} rows")
    distinct: dict[str, tuple[int, Pair]] = {}
    for number, pair in different:
        distinct.setdefault(pair.name, (number, pair))
    pairs = list(distinct.values())
    counts = {"of equal answers": len(rows) - len(different), "repeated": len(different) - len(pairs)}
    if left_out := [f"{count} {what}" for what, count in counts.items() if count]:
        print(f"{len(pairs)} of {len(rows)} pairs of {path} are used; left out: {', '.join(left_out)}", flush=True)
    return pairs


def readable(model: Folder, numbered: list[tuple[int, Pair]], path: Path) -> tuple[list[Pair], list[Pair]]:
    """The pairs (P,) of the file `path` whose answers the model reads whole, as they are and as it writes them; prints
    how many it does not.

    Raises:
        ValueError: a pair that cannot be written in the model's form, or an answer that is nothing but its end, with
            the line; or no pair is left.
    """
    prompts = [pair.prompt for _, pair in numbered for _ in "ab"]
    answers = [answer for _, pair in numbered for answer in pair[1:]]
    before, after = model.writer.pairs(prompts, answers, lambda text: f"line {numbered[text // 2][0]} of {path}")
    written = [*map(Pair, before[::2], after[::2], after[1::2])]
    tokens = model.texts.tokens(before, after)
    if (empty := tokens.empty.reshape(-1, 2).any(1)).any():
        number, _ = numbered[int(empty.argmax())]
        raise ValueError(
            f"line {number} of {path} needs answers with words, got one that is nothing but its end, in {empty.sum()} "
            f"of {len(numbered)} pairs: drop the row, because a reward for saying nothing means nothing"
        )
    whole = ~tokens.too_long.reshape(-1, 2).any(1)
    if not whole.any():
        raise ValueError(
            f"{path} needs a pair of answers within the {model.max_length} tokens that the model reads, got "
            f"none in {len(numbered)} pairs: shorten them, or take a reward model of longer texts"
        )
    if not whole.all():
        print(
            f"{(~whole).sum()} of {len(numbered)} pairs are not asked: they have an answer of more than the "
            f"{model.max_length} tokens that the model reads",
            flush=True,
        )
    kept = [(pair, text) for (_, pair), text, fits in zip(numbered, written, whole) if fits]
    return [pair for pair, _ in kept], [text for _, text in kept]


def score_pool(model: RewardModel, pairs: list[Pair], batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Base rewards of all answers a and of all answers b, (P, D) each. Every text is scored once."""
    texts = {json.dumps(text): text for pair in pairs for text in ((pair.prompt, pair.a), (pair.prompt, pair.b))}
    prompts, answers = zip(*texts.values())
    rows = dict(zip(texts, model.base_rewards(prompts, answers, batch_size)))
    a = np.array([rows[json.dumps((pair.prompt, pair.a))] for pair in pairs], np.float64)
    b = np.array([rows[json.dumps((pair.prompt, pair.b))] for pair in pairs], np.float64)
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
        print(f"{(~differ).sum()} of {len(pairs)} pairs are the same to the model and are not asked", flush=True)
    return [pair for pair, asked in zip(pairs, differ) if asked], a[differ], b[differ]


def write_scores(path: Path, a: np.ndarray, b: np.ndarray, pairs: list[Pair], fingerprint: str) -> None:
    """Saves the result of `score_pool`, with the model and the pairs that it belongs to."""
    with whole_file(path) as file:
        file.write(save({"a": a, "b": b}, _belongs_to(pairs, fingerprint)))


def read_scores(path: Path, pairs: list[Pair], fingerprint: str) -> tuple[np.ndarray, np.ndarray]:
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


def _belongs_to(pairs: list[Pair], fingerprint: str) -> dict[str, str]:
    return {"model": fingerprint, "pool": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()}
