"""The pairs that a new user may be asked about, and their base rewards."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from openrlhf_pgrpo.files import read_rows, whole_file

if TYPE_CHECKING:  # importing it takes seconds
    from openrlhf_pgrpo.models.scoring import RewardModel


class Pair(NamedTuple):
    """Two answers to a prompt; the columns of a pool."""

    prompt: str
    a: str
    b: str

    @property
    def name(self) -> str:
        """A hash of the texts that does not depend on the order of the answers or of the pool."""
        text = json.dumps([self.prompt, *sorted((self.a, self.b))])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_pool(path: Path) -> list[Pair]:
    """The pairs (P,) of a JSONL file with the columns prompt, a and b.

    Raises:
        ValueError: a row that is not whole, two equal answers, or a pair that occurs twice; with its line.
        OSError: the file cannot be read.
    """
    lines, pairs = {}, []
    for number, row in read_rows(path, dict.fromkeys(Pair._fields, str)):
        pair = Pair(*(row[column] for column in Pair._fields))
        if pair.a == pair.b:
            raise ValueError(f"line {number} of {path} needs two different answers, got {pair.a[:80]!r} twice")
        first = lines.setdefault(pair.name, number)
        if first != number:
            raise ValueError(f"line {number} of {path} needs a new pair, got that of line {first}: leave one out")
        pairs.append(pair)
    return pairs


def score_pool(model: "RewardModel", pairs: list[Pair], batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Base rewards of all answers a and of all answers b, (P, D) each. Every text is scored once."""
    texts = {(pair.prompt, answer): None for pair in pairs for answer in (pair.a, pair.b)}
    prompts, answers = zip(*texts)
    rows = dict(zip(texts, model.base_rewards(prompts, answers, batch_size)))
    a = np.array([rows[pair.prompt, pair.a] for pair in pairs], np.float64)
    b = np.array([rows[pair.prompt, pair.b] for pair in pairs], np.float64)
    return a, b


def write_scores(path: Path, a: np.ndarray, b: np.ndarray, pairs: list[Pair], fingerprint: str) -> None:
    """Saves the result of `score_pool`, with the model and the pairs that it belongs to."""
    with whole_file(path) as file:
        file.write(save({"a": a, "b": b}, _belongs_to(pairs, fingerprint)))


def read_scores(path: Path, pairs: list[Pair], fingerprint: str) -> tuple[np.ndarray, np.ndarray]:
    """The base rewards that `write_scores` saved.

    Raises:
        ValueError: a file of another kind, or for another model or pool.
        OSError: the file cannot be read.
    """
    try:
        with safe_open(path, "np") as file:
            found, (a, b) = file.metadata(), map(file.get_tensor, "ab")
    except SafetensorError as error:
        raise ValueError(f"{path} needs to hold the base rewards of a pool, got {error}: delete it") from error
    for what, needed in _belongs_to(pairs, fingerprint).items():
        if found is None or found.get(what) != needed:
            got = found and found.get(what)
            raise ValueError(f"{path} needs to be for the {what} {needed}, got one for {got}: name another file")
    return a, b


def _belongs_to(pairs: list[Pair], fingerprint: str) -> dict[str, str]:
    return {"model": fingerprint, "pool": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()}
