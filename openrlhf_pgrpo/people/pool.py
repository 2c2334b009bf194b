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

    Pairs of two equal answers, which nobody can choose between, and repetitions are left out, and their number is
    printed.

    Raises:
        ValueError: a row that is not whole, with its line; or no pair is left.
        OSError: the file cannot be read.
    """
    rows = [Pair(*(row[key] for key in Pair._fields)) for _, row in read_rows(path, dict.fromkeys(Pair._fields, str))]
    different = [pair for pair in rows if pair.a.strip() != pair.b.strip()]
    if not different:
        raise ValueError(f"{path} needs a pair of two different answers, got none in {len(rows)} rows")
    distinct: dict[str, Pair] = {}
    for pair in different:
        distinct.setdefault(pair.name, pair)
    pairs = list(distinct.values())
    counts = {"of equal answers": len(rows) - len(different), "repeated": len(different) - len(pairs)}
    if left_out := [f"{count} {what}" for what, count in counts.items() if count]:
        print(f"{len(pairs)} of {len(rows)} pairs of {path} are used; left out: {', '.join(left_out)}", flush=True)
    return pairs


def score_pool(model: "RewardModel", pairs: list[Pair], batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Base rewards of all answers a and of all answers b, (P, D) each. Every text is scored once."""
    texts = {(pair.prompt, answer): None for pair in pairs for answer in (pair.a, pair.b)}
    prompts, answers = zip(*texts)
    rows = dict(zip(texts, model.base_rewards(prompts, answers, batch_size)))
    a = np.array([rows[pair.prompt, pair.a] for pair in pairs], np.float64)
    b = np.array([rows[pair.prompt, pair.b] for pair in pairs], np.float64)
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
        raise ValueError(f"{path} needs to hold the base rewards of a pool, got {error}: delete it") from error
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
