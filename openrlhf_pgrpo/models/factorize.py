"""The fast way to a factorized reward model. A frozen backbone reads every text once, then core/factorization.py fits
head and coefficients in seconds (arXiv 2503.06358, with the features of section 3 kept fixed).

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.cross_validation import Choice, choose_factors
from openrlhf_pgrpo.core.factorization import fit
from openrlhf_pgrpo.files import read_rows
from openrlhf_pgrpo.models.folder import write
from openrlhf_pgrpo.models.scoring import embed

MOST_FACTORS = 8  # the most that are tried; the paper's curve is flat from 6 on
FEWEST_PROMPTS = 20  # with fewer prompts, pairs are held out instead: a fold would hold too few prompts


class Columns(NamedTuple):
    """Column names of a dataset. Without `preference` it is 1: the chosen answer was preferred."""

    user: str = "user"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    preference: str = "preference"


COLUMNS = Columns()


def read(path: Path, columns: Columns = COLUMNS) -> list[tuple[str, str, str, str, float]]:
    """(user, prompt, first answer, second answer, preference for the first) of each row of a JSONL file.

    Raises:
        ValueError: a row without a text in one of the first four columns, or with a preference that is not a number
            from 0 to 1; with its line.
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


def annotate(rows: list[tuple[str, str, str, str, float]]) -> tuple[list[tuple[str, str, str]], Annotations]:
    """The P distinct pairs (prompt, first answer, second answer) in rows of `read`, and their annotations.

    Answers are put in alphabetical order, so that a pair that some users saw the other way round is the same pair.
    """
    pairs: dict[tuple[str, str, str], int] = {}
    users, numbers, preferences = [], [], []
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
    rows = {text: row for row, text in enumerate(texts)}
    prompts, answers = zip(*texts)
    embeddings = embed(backbone, prompts, answers, pooling)
    first = [rows[prompt, answer] for prompt, answer, _ in pairs]
    second = [rows[prompt, answer] for prompt, _, answer in pairs]
    return embeddings[first] - embeddings[second]


def factorize(
    data: Path,
    backbone: str | Path,
    folder: Path,
    factors: int | None = None,
    l2: float | None = None,
    pooling: str = "last",
    columns: Columns = COLUMNS,
) -> Choice | None:
    """Fits a factorized reward model to a file of annotations and writes it; returns the cross-validated curve.

    Every dimension of X is first divided by its root mean square. In language models a few dimensions of a hidden
    state are hundreds of times larger than the rest, and the penalty would leave only those.

    Args:
        factors, l2: D and the penalty on both factors. None is chosen by cross-validation, which holds out whole
            prompts because the reward will meet new ones. If both are given, there is no curve: None.

    Raises:
        ValueError: as `read` and `core.factorization.fit`.
    """
    pairs, annotations = annotate(read(data, columns))
    X = differences(backbone, pairs, pooling)
    scale = np.sqrt(np.square(X).mean(0))
    scale[scale == 0] = 1.0
    choice = None
    if factors is None or l2 is None:
        most = min(MOST_FACTORS, len(annotations.users), *X.shape)
        tried: dict[str, Any] = {"factors": range(1, most + 1) if factors is None else (factors,)}
        if l2 is not None:
            tried["l2"] = (l2,)
        prompts = np.unique([prompt for prompt, *_ in pairs], return_inverse=True)[1]
        together = prompts if prompts.max() >= FEWEST_PROMPTS - 1 else None
        choice = choose_factors(X / scale, annotations, **tried, together=together)
        factors, l2 = choice.recommended, choice.l2
    found = fit(X / scale, annotations, factors, l2)
    write(folder, backbone, found.head / scale, found.coefficients, found.users, pooling)
    return choice
