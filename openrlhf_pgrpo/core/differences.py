"""What a factorization reads of texts: the differences of two answers' embeddings.

Axes: P pairs, T texts, H embedding dimensions, r independent dimensions of embeddings.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, issparse
from scipy.sparse.linalg import LinearOperator

from openrlhf_pgrpo.core.annotations import Annotations

COLUMNS_AT_ONCE = 64  # of all differences, while they are squared


class Differences(LinearOperator):
    """Differences (P, H) of the embeddings of texts, a matrix that is never made: there are fewer texts than pairs.

    Args:
        embeddings: (T, H). of: sparse (P, T), with a 1 and a -1 in the row of each pair.
    """

    def __init__(self, embeddings: np.ndarray, of: csr_matrix):
        super().__init__(np.float64, (of.shape[0], embeddings.shape[1]))
        self.embeddings, self.of = embeddings, of

    @classmethod
    def between(cls, embeddings: np.ndarray, first: Sequence[int], second: Sequence[int]) -> "Differences":
        """Those of the texts in rows `first` (P,) and `second` (P,)."""
        rows, pairs = np.stack([first, second], 1).ravel(), len(first)
        signs, starts = np.tile([1.0, -1.0], pairs), np.arange(0, 2 * pairs + 1, 2)
        of = csr_matrix((signs, rows, starts), (pairs, len(embeddings)))
        return cls(np.asarray(embeddings, np.float64), of)

    def _matmat(self, right: np.ndarray) -> np.ndarray:
        return self.of @ (self.embeddings @ right)

    def _rmatmat(self, right: np.ndarray) -> np.ndarray:
        return self.embeddings.T @ (self.of.T @ right)

    def times(self, matrix: np.ndarray) -> "Differences":
        """The same pairs in other dimensions: embeddings times a matrix (H, r)."""
        return Differences(self.embeddings @ matrix, self.of)

    def over(self, lengths: float | np.ndarray) -> "Differences":
        """Each dimension divided by its number of `lengths`, (H,) or one for all."""
        return Differences(self.embeddings / lengths, self.of)

    def products(self) -> np.ndarray:
        """X'X (H, H)."""
        return self.embeddings.T @ ((self.of.T @ self.of) @ self.embeddings)

    def squares(self) -> np.ndarray:
        """The diagonal (H,) of X'X; exactly 0 for a dimension in which all texts are equal."""
        some = np.array_split(self.embeddings, -(-self.shape[1] // COLUMNS_AT_ONCE), axis=1)
        return np.concatenate([np.square(self.of @ columns).sum(0) for columns in some])


def scaled(X, annotations: Annotations) -> tuple[Any, float]:
    """X in float64 with rows of mean square length 1, and the factor it was divided by.

    Raises:
        ValueError: X is no matrix with a row for each pair, has numbers that are not finite, or only zeros.
    """
    if X.ndim != 2:
        raise ValueError(f"differences of embeddings need shape (pairs, dimensions), got {X.shape}")
    check_pairs(annotations, X.shape[0])
    of_texts = isinstance(X, Differences)
    numbers = X.data if issparse(X) else X.embeddings if of_texts else X
    if not np.isfinite(numbers).all():
        where = "" if issparse(X) else f" of {'text' if of_texts else 'pair'} {np.argmin(np.isfinite(numbers).all(1))}"
        wrong = numbers[~np.isfinite(numbers)][0]
        raise ValueError(f"embeddings need finite numbers, got {wrong}{where}: embed it again")
    squares = X.squares() if of_texts else np.square(numbers, dtype=np.float64)
    scale = np.sqrt(squares.sum() / X.shape[0])
    if scale == 0:
        raise ValueError("differences of embeddings need numbers that are not 0, got only zeros")
    if of_texts:
        return X.over(scale), scale
    return (X.astype(np.float64) / scale).tocsr() if issparse(X) else np.divide(X, scale, dtype=np.float64), scale


def check_pairs(annotations: Annotations, pairs: int) -> None:
    """Raises ValueError if an annotation is about none of so many pairs."""
    if annotations.pair.max() >= pairs:
        raise ValueError(f"annotations need one of {pairs} pairs, got row {annotations.pair.max()}")
