"""Few base rewards shared by all and a few coefficients per user, from who preferred what (arXiv 2503.06358).

    r_u(answer) = lambda_u . phi(answer)                                                                       (Eq. 3)
    p(y1 > y2 | u) = sigmoid(lambda_u . v),  v = phi(y1) - phi(y2) = head x                                    (Eq. 4)
    loss = sum over annotations of BCE(preference, p) + l2/2 (|head|^2 + |Lambda|^2)                   (after Eq. 5)

x is the difference of the two answers' embeddings: frozen ones, or one-hot item numbers. The paper penalises Lambda
alone, which leaves the scale undetermined: head/c and c Lambda predict the same, and cost less for c < 1. With both
factors penalised, the cheapest form of the same predictions costs l2 times the nuclear norm of Lambda head. With as
many base rewards as the data carry, the fit is the same from any start; with fewer it nearly always is. First, x is
scaled to a mean square length of 1. Then l2 = 1 means the prior N(0, 1) for every number in both factors, whatever the
embedding.

Predictions do not change under head -> R head, Lambda -> Lambda R^-1, so the result is brought to a canonical form.

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations, r independent dimensions of embeddings.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix, issparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, aslinearoperator, lsmr, svds
from scipy.special import expit

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.differences import Differences, check_pairs
from openrlhf_pgrpo.core.optimum import Problem, logits, minimum

ROUNDS = 10  # of imputation, which only gives the start of the search
CARRIED = 1e-3  # Base rewards whose logits (or share of the strongest's) stay below this were shrunk to zero.


class NotCarried(ValueError):
    """More base rewards than the data carry; `carried` is the number that they carry with this penalty."""

    def __init__(self, asked: int, carried: int):
        fewer = f"ask for at most {carried} (choose_factors tells how many help), or " if carried else ""
        got = f"{asked} base rewards need data that carry as many, got {carried} at this l2"
        super().__init__(f"{got}: {fewer}lower l2")
        self.carried = carried


@dataclass(frozen=True)
class Factorization:
    """head (D, H) and coefficients (U, D), float64, one row per name in users (U,). `fit` gives the canonical form."""

    head: np.ndarray
    coefficients: np.ndarray
    users: list[str]

    def features(self, X) -> np.ndarray:
        """Base rewards (..., D) of embeddings (..., H); their differences, if X has differences of embeddings."""
        return X @ self.head.T

    def predict(self, X, user: np.ndarray) -> np.ndarray:
        """p (N,) that the users in rows `user` (N,) prefer the first answer, for differences X (N, H)."""
        return expit(np.einsum("nd,nd->n", self.features(X), self.coefficients[user]))


def fit(X, annotations: Annotations, factors: int, l2: float = 3.0) -> Factorization:
    """Fits head and coefficients together, as `optimum.minimum`, from the signed SVD. Nothing in it is random.

    Args:
        X: (P, H), embedding of a pair's first answer minus that of its second; dense, `Differences`, or sparse
            one-hot differences of item numbers (the identity, if only pairs are numbered).
        factors: D.
        l2: penalty of both factors, see above; `choose_factors` finds one.

    Raises:
        ValueError: embeddings that are not finite or too few, a sparse X over which users do not overlap, or ties
            only.
        NotCarried: a ValueError for more base rewards than the data carry. Those that the penalty shrinks to zero do
            not count.
        ArithmeticError: no convergence.
    """
    check_overlap(X, annotations)
    problem = Problem.of(X, annotations)
    head, coefficients = minimum(problem, *start(problem, annotations, factors), l2)
    head = head @ problem.basis
    return Factorization(*canonical(head, coefficients, X @ head.T), list(annotations.users))


def canonical(head: np.ndarray, coefficients: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A head (D, H) and coefficients (U, D) in canonical form: the same predictions, one result for all equivalents.

    1. The second moment of the pair features (P, D) on these pairs becomes the identity. It is taken about 0, because
       the order of the two answers of a pair means nothing.
    2. That of the coefficients becomes diagonal, with the mean square of the logits that each base reward adds,
       largest first.
    3. In each row of the head, the number of largest size becomes positive.

    Base rewards that add equally much are tied: any rotation among them would do.

    Raises:
        NotCarried: the data carry fewer than D base rewards.
    """
    values, axes = np.linalg.eigh(features.T @ features / len(features))
    lengths = np.sqrt(np.maximum(values, 0))
    white = coefficients @ (axes * lengths)
    moments, rotation = np.linalg.eigh(white.T @ white / len(white))
    carried = int((moments > CARRIED**2 * max(moments[-1], 1)).sum())
    if carried < len(head):
        raise NotCarried(len(head), carried)
    rotation = rotation[:, ::-1]
    head = rotation.T @ ((axes / lengths).T @ head)
    coefficients = white @ rotation
    signs = np.sign(head[np.arange(len(head)), np.abs(head).argmax(1)])
    return head * signs[:, None], coefficients * signs


# --- the start -------------------------------------------------------------------------------------------------------


def start(problem: Problem, annotations: Annotations, factors: int) -> tuple[np.ndarray, np.ndarray]:
    """The head (D, r) and coefficients (U, D) of the imputed SVD, from which the search starts.

    Raises:
        ValueError: fewer users, pairs or independent dimensions than base rewards, or ties only.
    """
    X = problem.X
    pairs, dimensions = X.shape
    sizes = {"users": len(annotations.users), "pairs": pairs, "independent embedding dimensions": dimensions}
    check_factors(factors, sizes)
    if issparse(X):
        coefficients, features = impute(annotations, X.shape[0], factors)
        return np.stack([lsmr(X, column)[0] for column in features.T]), coefficients
    lengths = np.sqrt(problem.squares)
    coefficients, inside = impute(annotations, pairs, factors, X.over(lengths))
    return inside.T / lengths, coefficients


def impute(
    annotations: Annotations, pairs: int, factors: int, basis: Differences | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (U, D) and pair features (P, D), from the SVD of the signed labels (arXiv 2503.06358, section 2).

    Labels are 2a - 1, so that no base reward is spent on their level. Missing labels start as 0 and are then replaced,
    ROUNDS times, by the approximation of rank D. No (U, P) matrix is ever made: the solver sees the sparse residual of
    the known labels plus the low rank.

    Args:
        basis: (P, r), orthonormal. If given, only features in its span are searched, and their (r, D) coordinates
            are returned. Then users need not share pairs.

    Raises:
        ValueError: ties only.
    """
    shape = len(annotations.users), pairs
    cell = annotations.user, annotations.pair
    known = coo_matrix((2 * annotations.preference - 1, cell), shape).tocsr()  # sums the answers to one pair
    known.data /= coo_matrix((np.ones(len(annotations)), cell), shape).tocsr().data
    if not known.data.any():
        raise ValueError("annotations need a preference, got only ties: ask about other pairs")
    user = np.repeat(np.arange(shape[0]), np.diff(known.indptr))
    residual = known.copy()
    size = pairs if basis is None else basis.shape[1]
    coefficients, inside = np.zeros((shape[0], factors)), np.zeros((size, factors))

    for _ in range(ROUNDS):
        sparse = aslinearoperator(residual)
        if basis is not None:
            sparse = sparse @ basis
        filled = sparse + aslinearoperator(coefficients) @ aslinearoperator(inside.T)
        left, strengths, right = _leading_triplets(filled, factors)
        coefficients, inside = left * np.sqrt(strengths), right.T * np.sqrt(strengths)
        features = inside if basis is None else basis @ inside
        residual.data = known.data - logits(features, coefficients, known.indices, user)
    return coefficients, inside


def _leading_triplets(matrix: LinearOperator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets, largest first."""
    if count < min(matrix.shape):
        first = np.random.default_rng(0).normal(size=min(matrix.shape))  # any start not orthogonal to them would do
        left, strengths, right = svds(matrix, count, v0=first)
    else:  # the sparse solver cannot find all of them
        left, strengths, right = np.linalg.svd(matrix @ np.eye(matrix.shape[1]), full_matrices=False)
    order = np.argsort(-strengths)
    return left[:, order], strengths[order], right[order]


def check_factors(factors: int, sizes: dict[str, int]) -> None:
    """Raises ValueError if there cannot be so many base rewards, because one of the sizes, by name, is lower."""
    if factors < 1:
        raise ValueError(f"a factorization needs at least one base reward, got {factors}")
    for name, size in sizes.items():
        if factors > size:
            raise ValueError(f"{factors} base rewards need as many {name}, got {size}: lower factors")


def check_overlap(X, annotations: Annotations) -> None:
    """Raises ValueError if X is sparse and users fall into sets that share no item.

    Item numbers relate two users only through items that both know, directly or through other users.
    """
    check_pairs(annotations, X.shape[0])
    if not issparse(X):
        return
    users = len(annotations.users)
    size = users + X.shape[1]
    answered = coo_matrix((np.ones(len(annotations)), (annotations.user, annotations.pair)), (users, X.shape[0]))
    user, item = (answered @ abs(X)).nonzero()
    graph = coo_matrix((np.ones(len(user)), (user, item + users)), (size, size))
    parts = np.unique(connected_components(graph, directed=False)[1][:users], return_counts=True)[1]
    if len(parts) > 1:
        raise ValueError(
            f"item numbers say nothing without overlap: {len(parts)} sets of users, the largest of {parts.max()} of "
            f"{users}, share no pair with the others: give embeddings of the answers, ask about shared pairs, or "
            "leave the smaller sets out"
        )
