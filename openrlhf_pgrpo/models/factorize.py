"""The fast road to a factorized reward model: a frozen backbone reads every text once, then core/factorization.py fits
head and coefficients in seconds (arXiv 2503.06358, with the features of section 3 kept fixed).

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations.
"""

from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from openrlhf_pgrpo.core.factorization import Annotations, Choice, choose_factors, fit
from openrlhf_pgrpo.core.rows import read_rows
from openrlhf_pgrpo.models.factorized_reward import embed, write

MOST_FACTORS = 8  # that are tried; the paper's curve is flat from 6 on
FEWEST_PROMPTS = 20  # below that, pairs and not prompts are held out: there would be too few in a fold


class Columns(NamedTuple):
    """Names of the columns of a dataset; `preference` may be missing: then chosen was preferred, 1."""

    user: str = "user"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    preference: str = "preference"


def read(path: Path, columns: Columns = Columns()) -> list[tuple[str, str, str, str, float]]:
    """(user, prompt, first answer, second answer, preference for the first) of each row of a JSONL file.

    Raises:
        ValueError: a row without these columns, texts but for preference, which is a number from 0 to 1; with its line.
    """
    rows = []
    for number, row in read_rows(path, dict.fromkeys(columns[:4], str)):
        place = f"line {number} of {path}"
        if not row[columns.user]:
            raise ValueError(f"{place} needs a user, got none in {columns.user!r}: fill it in or drop the row")
        preference = row.get(columns.preference, 1.0)
        if isinstance(preference, bool) or not isinstance(preference, (int, float)) or not 0 <= preference <= 1:
            need = f"a number from 0 (rejected) to 1 (chosen) in {columns.preference!r}"
            raise ValueError(f"{place} needs {need}, got {preference!r}: correct it")
        rows.append((*(row[key] for key in columns[:4]), float(preference)))
    return rows


def annotate(rows) -> tuple[list[tuple[str, str, str]], Annotations]:
    """The P different pairs (prompt, first answer, second answer) of rows of `read`, and the annotations of them.

    A pair that some users saw the other way round is the same pair: its answers are put in alphabetical order.
    """
    pairs, users, numbers, preferences = {}, [], [], []
    for user, prompt, first, second, preference in rows:
        if first > second:
            first, second, preference = second, first, 1 - preference
        numbers.append(pairs.setdefault((prompt, first, second), len(pairs)))
        users.append(user)
        preferences.append(preference)
    return list(pairs), Annotations.of(users, np.array(numbers), np.array(preferences))


def differences(backbone: str | Path, pairs: Sequence[tuple[str, str, str]], pooling: str) -> np.ndarray:
    """X (P, H) float64: embedding of the first answer minus that of the second. Every text is read once."""
    texts = list(dict.fromkeys((prompt, answer) for prompt, *answers in pairs for answer in answers))
    place = dict(zip(texts, range(len(texts))))
    embeddings = embed(backbone, *zip(*texts), pooling=pooling)
    first, second = ([place[pair[0], pair[side]] for pair in pairs] for side in (1, 2))
    return embeddings[first] - embeddings[second]


def factorize(
    data: Path,
    backbone: str | Path,
    folder: Path,
    factors: int | None = None,
    l2: float | None = None,
    pooling: str = "last",
    columns: Columns = Columns(),
) -> Choice | None:
    """Reads annotations, fits and writes a factorized reward model; the cross-validated curve, if one was needed.

    Every dimension of X is first divided by its root mean square: hidden states of language models have a few that are
    hundreds of times larger than the rest, and would else be all that the penalty lets through.

    Args:
        factors, l2: D and the penalty of both factors; what is None is chosen by cross-validation over prompts, as
            the reward will meet new ones.

    Raises:
        ValueError: as `read` and core/factorization.py's `fit`.
    """
    pairs, annotations = annotate(read(data, columns))
    X = differences(backbone, pairs, pooling)
    scale = np.sqrt(np.square(X).mean(0))
    scale[scale == 0] = 1.0
    choice = None
    if factors is None or l2 is None:
        most = min(MOST_FACTORS, len(annotations.users), *X.shape)
        tried = {"factors": range(1, most + 1) if factors is None else (factors,)}
        if l2 is not None:
            tried["l2"] = (l2,)
        prompts = np.unique([prompt for prompt, *_ in pairs], return_inverse=True)[1]
        together = prompts if prompts.max() >= FEWEST_PROMPTS - 1 else None
        choice = choose_factors(X / scale, annotations, **tried, together=together)
        factors, l2 = choice.recommended, choice.l2
    found = fit(X / scale, annotations, factors, l2)
    write(folder, backbone, found.head / scale, found.coefficients, found.users, pooling)
    return choice
