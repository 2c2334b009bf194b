"""Few base rewards shared by all and a few coefficients per user, from who preferred what (arXiv 2503.06358).

    r_u(answer) = lambda_u . phi(answer)                                                                       (Eq. 3)
    p(y1 > y2 | u) = sigmoid(lambda_u . v),  v = phi(y1) - phi(y2) = head x                                    (Eq. 4)
    loss = sum over annotations of BCE(preference, p) + l2/2 (|head|^2 + |Lambda|^2)                   (after Eq. 5)

x is the difference of the two answers' embeddings: frozen ones, or one-hot item numbers. The paper penalises Lambda
alone, which leaves the scale free: head/c and c Lambda predict the same, and cost less for c < 1. With both factors
penalised, the cheapest form of the same predictions costs l2 times the nuclear norm of Lambda head, and the fit is in
practice the same from any start. x is scaled to a mean square length of 1 beforehand, so that l2 = 1 means the prior
N(0, 1) of every number in both factors for any embedding.

Predictions do not change under head -> R head, Lambda -> Lambda R^-1, so the result is brought to a canonical form.

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations, K folds.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize
from scipy.sparse import coo_matrix, csr_matrix, identity, issparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, aslinearoperator, lsmr, svds
from scipy.special import expit, softmax

from openrlhf_pgrpo.core.elicitation import Prior, posteriors
from openrlhf_pgrpo.core.robust import some

KINDS = ("factorized", "shared", "simplex")
ROUNDS = 10  # of imputation: the joint fit does the rest
CARRIED = 1e-3  # logits, or share of the strongest base reward's: what adds less was put out by the penalty
ITERATIONS = 5000
NUMBERS_AT_ONCE = 10**7  # in the Gram matrices of `per_user`


@dataclass(frozen=True)
class Annotations:
    """Who preferred what: N answers of U users to pairs.

    Args:
        user: (N,) rows of `users`. pair: (N,) rows of the pair matrix. preference: (N,) from 0 to 1: 1 if the first
            answer of the pair was preferred, 0 if the second, 0.5 for a tie, anything between for a soft label.
        users: (U,) names.

    Raises:
        ValueError: sizes that differ, a preference out of range, a row that cannot be, a name that comes twice, or a
            user without pairs.
    """

    user: np.ndarray
    pair: np.ndarray
    preference: np.ndarray
    users: Sequence[str]

    def __post_init__(self):
        columns = {name: np.asarray(getattr(self, name)) for name in ("user", "pair", "preference")}
        shapes = [column.shape for column in columns.values()]
        if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
            raise ValueError(f"annotations need user, pair and preference of one length above 0, got shapes {shapes}")
        for name in ("user", "pair"):
            if columns[name].dtype.kind not in "iu":
                raise ValueError(f"annotations need row numbers as {name}, got {columns[name].dtype}")
            columns[name] = columns[name].astype(np.int64)
        columns["preference"] = columns["preference"].astype(np.float64)
        for name, value in {**columns, "users": list(self.users)}.items():
            object.__setattr__(self, name, value)
        good = (self.preference >= 0) & (self.preference <= 1)
        if not good.all():
            row = np.argmin(good)
            raise ValueError(f"annotation {row} needs a preference from 0 to 1, got {self.preference[row]}")
        if self.pair.min() < 0:
            raise ValueError(f"annotation {self.pair.argmin()} needs a row of the pairs, got {self.pair.min()}")
        if len(set(self.users)) < len(self.users):
            raise ValueError(f"users need different names, got {len(self.users)} with {len(set(self.users))} names")
        if self.user.min() < 0 or self.user.max() >= len(self.users):
            wrong = self.user.min() if self.user.min() < 0 else self.user.max()
            raise ValueError(f"annotations need one of {len(self.users)} users, got row {wrong}")
        without = np.flatnonzero(np.bincount(self.user, minlength=len(self.users)) == 0)
        if len(without):
            raise ValueError(
                f"every user needs pairs, got none of {some([self.users[row] for row in without])}: leave them out, "
                "and let core/elicitation.py serve them as new users"
            )

    @classmethod
    def of(cls, names: Sequence[str], pair: np.ndarray, preference: np.ndarray) -> "Annotations":
        """From the user's name of each annotation (N,); rows are in the order of names."""
        users = sorted(set(names))
        rows = dict(zip(users, range(len(users))))
        return cls(np.fromiter(map(rows.__getitem__, names), np.int64, len(names)), pair, preference, users)

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Annotations":
        """Those annotations (rows or mask) of the same users."""
        return Annotations(self.user[rows], self.pair[rows], self.preference[rows], self.users)


class NotCarried(ValueError):
    """More base rewards than the data carry; `carried` tells how many they do, with this penalty."""

    def __init__(self, asked: int, carried: int):
        less = f"ask for at most {carried} (choose_factors tells how many help), or " if carried else ""
        super().__init__(f"{asked} base rewards need data that carry as many, got {carried} at this l2: {less}lower l2")
        self.carried = carried


@dataclass(frozen=True)
class Factorization:
    """head (D, H) and coefficients (U, D), float64, one row per name in users (U,).

    Kind "factorized" is in canonical form, see `canonical`; "shared" has one base reward and coefficients of 1, and the
    rows of "simplex" are weights >= 0 that add up to 1.
    """

    head: np.ndarray
    coefficients: np.ndarray
    users: list[str]
    kind: str = "factorized"

    def features(self, X) -> np.ndarray:
        """Base rewards (..., D) of embeddings (..., H), or differences of base rewards of differences of embeddings."""
        return X @ self.head.T

    def predict(self, X, user: np.ndarray) -> np.ndarray:
        """p (N,) that the users in rows `user` (N,) prefer the first answer, for differences X (N, H)."""
        return expit(np.einsum("nd,nd->n", self.features(X), self.coefficients[user]))

    def coefficients_of(self, names: Sequence[str], unknown: str = "refuse") -> np.ndarray:
        """Coefficients (n, D) of users by name; `unknown="mean"` gives a stranger the mean of all users.

        Raises:
            ValueError: a name that is none of `users`, unless the mean was asked for.
        """
        if unknown not in ("refuse", "mean"):
            raise ValueError(f"unknown users need 'refuse' or 'mean', got {unknown!r}")
        rows = dict(zip(self.users, range(len(self.users))))
        strangers = [name for name in dict.fromkeys(names) if name not in rows]
        if strangers and unknown == "refuse":
            raise ValueError(f"rewards need a trained user, got {some(strangers)}: elicit them, or ask for the mean")
        table = np.vstack([self.coefficients, self.coefficients.mean(0)])
        return table[[rows.get(name, len(rows)) for name in names]]

    def prior(self) -> Prior:
        """Mean and covariance of the trained users, where a new user starts."""
        return Prior.of(self.coefficients)


def fit(X, annotations: Annotations, factors: int, l2: float = 3.0, kind: str = "factorized") -> Factorization:
    """Head and coefficients together, by L-BFGS-B from the signed SVD; no chance is involved.

    Args:
        X: (P, H), embedding of a pair's first answer minus that of its second; dense, or sparse one-hot differences
            of item numbers (the identity, if only pairs are numbered).
        factors: D; 1 for "shared".
        l2: penalty of both factors, see above; `choose_factors` finds one.
        kind: "factorized", the paper's; "shared", one reward for all (Bradley-Terry); "simplex", coefficients that
            are a softmax, as LoRe's (arXiv 2504.14439), their logits penalised.

    Raises:
        ValueError: embeddings that are not finite or too few, a sparse X over which users do not overlap, or ties
            only.
        NotCarried: a ValueError for more base rewards than the data carry; those penalised to nothing count as none.
        RuntimeError: no convergence.
    """
    if kind != "shared":
        _check_items(X, annotations)
    head, coefficients = _fit(X, annotations, factors, l2, kind)
    if kind == "factorized":
        head, coefficients = canonical(head, coefficients, X @ head.T)
    return Factorization(head, coefficients, list(annotations.users), kind)


def canonical(head: np.ndarray, coefficients: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head (D, H) and coefficients (U, D) that predict the same and are the same for all equivalent ones.

    1. The second moment of the pair features (P, D) on these pairs becomes the identity. It is about 0, as which
       answer of a pair comes first means nothing.
    2. That of the coefficients becomes diagonal, largest first: the mean square of the logits a base reward adds.
    3. The largest number, without its sign, in each row of the head is positive.

    Base rewards that add equally much are tied: any rotation among them would do.

    Raises:
        NotCarried: fewer than D base rewards are.
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


def initial_factors(annotations: Annotations, pairs: int, factors: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair features (P, D) and coefficients (U, D), from the SVD of the signed labels (arXiv 2503.06358, section 2).

    Labels are 2a - 1, so that no reward of its own goes into their level; what is missing starts as 0 and is then
    replaced, ROUNDS times, by what rank D says. No (U, P) matrix is ever made: the solver sees the sparse residual of
    the known plus the low rank.

    Raises:
        ValueError: pairs over which users do not overlap, ties only, or D above U or P.
    """
    _check_factors(factors, {"users": len(annotations.users), "pairs": pairs})
    _check_items(identity(pairs, format="csr"), annotations)
    coefficients, features = _impute(annotations, pairs, factors, None)
    return features, coefficients


def per_user(X: np.ndarray, annotations: Annotations, l2: float = 3.0) -> np.ndarray:
    """The baseline of one model per user: heads (U, H), each fitted to its user's annotations alone.

    A head is a sum of its user's n pairs, so n numbers are sought and not H; l2 is as in `fit`.
    """
    X, scale = _scaled(X, annotations)
    user, pair, preference, starts = _by_user(annotations)
    counts = np.diff(starts)
    order = np.argsort(counts, kind="stable")  # users with like many pairs are padded together
    heads = np.empty((len(counts), X.shape[1]))
    while len(order):
        size = max(1, int(NUMBERS_AT_ONCE / counts[order[-1]] / max(counts[order[-1]], X.shape[1])))
        chunk, order = order[-size:], order[:-size]
        place = np.arange(counts[chunk].max())
        known = place < counts[chunk, None]
        rows = np.where(known, starts[chunk, None] + place, 0)
        own = np.where(known[..., None], X[pair[rows]], 0.0)
        values, axes = np.linalg.eigh(own @ own.swapaxes(1, 2))
        lengths = np.sqrt(np.maximum(values, 0))
        features = axes * lengths[:, None]
        start = Prior(np.zeros(len(place)), np.eye(len(place)) / l2)
        found, _ = posteriors(features, preference[rows], start)  # what is padded has features of 0
        found = np.divide(found, lengths, out=np.zeros_like(found), where=values > 1e-10 * values[:, -1:])
        heads[chunk] = np.einsum("unk,uk,unh->uh", axes, found, own, optimize=True)
    return heads / scale


class Choice(NamedTuple):
    """A cross-validated curve: for factors (F,), held-out log loss per annotation (F,) with its standard error over
    folds (F,) at the l2 (F,) that is best for each; the recommended D and its l2."""

    factors: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    l2s: np.ndarray
    recommended: int
    l2: float

    def __str__(self) -> str:
        rows = zip(self.factors, self.loss, self.error, self.l2s)
        marks = {self.recommended: "  <- recommended: the fewest within one standard error of the best"}
        lines = [f"{d:12} {loss:9.4f} ±{error:.4f} {l2:6g}{marks.get(d, '')}" for d, loss, error, l2 in rows]
        return "\n".join([f"{'base rewards':>12} {'held-out log loss':>17} {'l2':>6}", *lines])


def choose_factors(
    X,
    annotations: Annotations,
    factors: Sequence[int] = tuple(range(1, 9)),
    l2: Sequence[float] = (1.0, 3.0, 10.0, 30.0),
    folds: int = 5,
    seed: int = 0,
    together: Optional[np.ndarray] = None,
) -> Choice:
    """How many base rewards predict held-out annotations best, each number with its own best penalty.

    A user's annotations are dealt evenly to the folds, those of one pair together; of a user with a single pair none
    is held out. The seed only deals. Recommended is the smallest D whose loss is within one standard error of the
    least.

    Args:
        together: (P,) what pairs have in common that a reward will meet anew, such as their prompt. Then these are
            dealt to the folds, and a user who has pairs in one fold alone keeps them for training. Without it, texts
            of held-out pairs are known from others, and the penalty comes out too low for texts that are not.

    Raises:
        ValueError: as `fit`; fewer than 2 folds, or nothing to hold out.
    """
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {folds}")
    _check_items(X, annotations)
    rng = np.random.default_rng(seed)
    fold = _deal(annotations, folds, rng) if together is None else _deal_together(annotations, together, folds, rng)
    if len(np.unique(fold[fold >= 0])) < folds:
        raise ValueError(f"cross-validation needs users with {folds} pairs or fewer folds, got too few pairs")
    losses = np.empty((len(factors), len(l2), folds))
    for k in range(folds):
        training = annotations.take(fold != k)
        columns = annotations.user, annotations.pair, annotations.preference
        user, pair, preference = (column[fold == k] for column in columns)
        for i, count in enumerate(factors):
            for j, penalty in enumerate(l2):
                head, coefficients = _fit(X, training, count, penalty, "factorized")
                losses[i, j, k] = _bce(_logits(X @ head.T, coefficients, pair, user), preference) / len(user)
    best = losses.mean(2).argmin(1)
    curve = losses[np.arange(len(factors)), best]
    mean, error = curve.mean(1), curve.std(1, ddof=1) / np.sqrt(folds)
    least = mean.argmin()
    good = [i for i in range(len(factors)) if mean[i] <= mean[least] + error[least]]
    chosen = min(good, key=lambda i: factors[i])
    l2s = np.asarray(l2, np.float64)[best]
    return Choice(np.asarray(factors), mean, error, l2s, int(factors[chosen]), float(l2s[chosen]))


def _fit(X, annotations: Annotations, factors: int, l2: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Head (D, H) and coefficients (U, D) that minimise the loss, in whatever form the search ends."""
    if kind not in KINDS:
        raise ValueError(f"kind needs one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "shared" and factors != 1:
        raise ValueError(f"one reward for all needs factors=1, got {factors}")
    if not 0 < l2 < np.inf:
        raise ValueError(f"l2 needs a finite number above 0, without which the scale of the factors is free, got {l2}")
    X, scale = _scaled(X, annotations)
    axes = identity(X.shape[1]) if issparse(X) else _axes(X)
    X = X @ axes
    sizes = {"users": len(annotations.users), "pairs": X.shape[0], "independent embedding dimensions": X.shape[1]}
    _check_factors(factors, sizes)
    user, pair, preference, starts = _by_user(annotations)
    head, table = _start(X, annotations, factors, kind)
    size = head.size

    def loss_and_slope(numbers):
        head, table = numbers[:size].reshape(head_shape), numbers[size:].reshape(table_shape)
        coefficients = _weights(kind, table, len(starts) - 1)
        features = X @ head.T
        z = _logits(features, coefficients, pair, user)
        residual = csr_matrix((expit(z) - preference, pair, starts), shape=(len(starts) - 1, X.shape[0]))
        slope = np.empty_like(numbers)
        slope[:size] = (X.T @ (residual.T @ coefficients)).T.ravel()
        if kind != "shared":
            by_coefficients = residual @ features
            if kind == "simplex":
                by_coefficients = coefficients * (by_coefficients - (coefficients * by_coefficients).sum(1)[:, None])
            slope[size:] = by_coefficients.ravel()
        return _bce(z, preference) + l2 / 2 * (numbers @ numbers), slope + l2 * numbers

    head_shape, table_shape = head.shape, table.shape
    options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-11}
    first = np.concatenate([head.ravel(), table.ravel()])
    found = minimize(loss_and_slope, first, jac=True, method="L-BFGS-B", options=options)
    if found.status == 1:
        raise RuntimeError(f"the fit needs fewer than {ITERATIONS} iterations, got no end: raise l2, now {l2:g}")
    table = found.x[size:].reshape(table_shape)
    return found.x[:size].reshape(head_shape) @ (axes.T / scale), _weights(kind, table, len(starts) - 1)


def _axes(X: np.ndarray) -> np.ndarray:
    """Orthonormal axes (H, r) of what the rows of X span, in which its columns are orthogonal. A penalised head never
    leaves that span, and where H is above P or there are few items, searching inside it is much faster."""
    values, axes = np.linalg.eigh(X.T @ X)
    return axes[:, values > 1e-10 * values[-1]]


def _weights(kind: str, table: np.ndarray, users: int) -> np.ndarray:
    """Coefficients (U, D) from the numbers that are sought."""
    if kind == "shared":
        return np.ones((users, 1))
    return softmax(table, axis=1) if kind == "simplex" else table


def _start(X, annotations: Annotations, factors: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Head (D, H) and table of coefficients, (U, D) or none, from which the search starts; the columns of X are
    orthogonal, unless it is sparse."""
    if kind == "shared":
        return np.zeros((1, X.shape[1])), np.zeros((0, 1))
    if issparse(X):
        coefficients, features = _impute(annotations, X.shape[0], factors, None)
        head = np.stack([lsmr(X, column)[0] for column in features.T])
    else:
        lengths = np.linalg.norm(X, axis=0)
        coefficients, inside = _impute(annotations, X.shape[0], factors, X / lengths)
        head = inside.T / lengths
    if kind == "simplex":  # a base reward for each of D clusters of users, who lean to their own
        centres, cluster = kmeans2(coefficients, factors, minit="++", rng=0)
        return centres @ head, 2.0 * np.eye(factors)[cluster]
    scale = np.sqrt(np.linalg.norm(coefficients) / np.linalg.norm(head))
    return head * scale, coefficients / scale


def _impute(annotations: Annotations, pairs: int, factors: int, basis: Optional[np.ndarray]):
    """Coefficients (U, D) and pair features (P, D) of the imputed SVD. With an orthonormal basis (P, r) only features
    in its span are sought and returned by their (r, D) coordinates, so that users need not share pairs."""
    shape = len(annotations.users), pairs
    cell = annotations.user, annotations.pair
    known = coo_matrix((2 * annotations.preference - 1, cell), shape).tocsr()  # answers to one pair add up
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
            sparse = sparse @ aslinearoperator(basis)
        filled = sparse + aslinearoperator(coefficients) @ aslinearoperator(inside.T)
        left, strengths, right = _leading(filled, factors)
        coefficients, inside = left * np.sqrt(strengths), right.T * np.sqrt(strengths)
        features = inside if basis is None else basis @ inside
        residual.data = known.data - _logits(features, coefficients, known.indices, user)
    return coefficients, inside


def _leading(matrix: LinearOperator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets, largest first."""
    if count < min(matrix.shape):
        start = np.random.default_rng(0).normal(size=min(matrix.shape))  # any would do that is not orthogonal to them
        left, strengths, right = svds(matrix, count, v0=start)
    else:  # all there are, of which the sparse solver finds no more than all but one
        left, strengths, right = np.linalg.svd(matrix @ np.eye(matrix.shape[1]), full_matrices=False)
    order = np.argsort(-strengths)
    return left[:, order], strengths[order], right[order]


def _logits(features: np.ndarray, coefficients: np.ndarray, pair: np.ndarray, user: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", features[pair], coefficients[user])


def _bce(z: np.ndarray, preference: np.ndarray) -> float:
    """Sum of the cross-entropies."""
    return np.logaddexp(0, z).sum() - preference @ z


def _by_user(annotations: Annotations) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """user, pair and preference in the order of users, and where each user's begin and the last one's end (U + 1,)."""
    order = np.lexsort((annotations.pair, annotations.user))
    starts = np.concatenate([[0], np.cumsum(np.bincount(annotations.user, minlength=len(annotations.users)))])
    return annotations.user[order], annotations.pair[order], annotations.preference[order], starts


def _scaled(X, annotations: Annotations):
    """X in float64 with rows of mean square length 1, and the factor it was divided by."""
    if X.ndim != 2:
        raise ValueError(f"differences of embeddings need shape (pairs, dimensions), got {X.shape}")
    _check_pairs(annotations, X.shape[0])
    numbers = X.data if issparse(X) else X
    if not np.isfinite(numbers).all():
        where = "" if issparse(X) else f" of pair {np.argmin(np.isfinite(X).all(1))}"
        wrong = numbers[~np.isfinite(numbers)][0]
        raise ValueError(f"embeddings need finite numbers, got {wrong}{where}: embed it anew")
    scale = np.sqrt(np.square(numbers, dtype=np.float64).sum() / X.shape[0])
    if scale == 0:
        raise ValueError("differences of embeddings need numbers other than 0, got only zeros")
    return (X.astype(np.float64) / scale).tocsr() if issparse(X) else np.divide(X, scale, dtype=np.float64), scale


def _check_factors(factors: int, sizes: dict[str, int]) -> None:
    if factors < 1:
        raise ValueError(f"a factorization needs at least one base reward, got {factors}")
    for name, size in sizes.items():
        if factors > size:
            raise ValueError(f"{factors} base rewards need as many {name}, got {size}: lower factors")


def _check_pairs(annotations: Annotations, pairs: int) -> None:
    if annotations.pair.max() >= pairs:
        raise ValueError(f"annotations need one of {pairs} pairs, got row {annotations.pair.max()}")


def _check_items(X, annotations: Annotations) -> None:
    """Item numbers, which are sparse, say of two users only what links them, directly or through others."""
    _check_pairs(annotations, X.shape[0])
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
            f"{users}, share no pair with the others: give embeddings of the answers, ask about shared pairs, or leave "
            "the smaller sets out"
        )


def _deal(annotations: Annotations, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (N,) of each annotation; -1 for that of a user with a single pair, who keeps it for training."""
    cells = np.stack([annotations.user, annotations.pair], 1)
    cells, cell = np.unique(cells, axis=0, return_inverse=True)
    order = np.lexsort((rng.random(len(cells)), cells[:, 0]))
    counts = np.bincount(cells[:, 0])
    starts = np.cumsum(counts) - counts
    first = rng.integers(folds, size=len(counts))  # otherwise users with few pairs would all be in the first folds
    fold = np.empty(len(cells), np.int64)
    fold[order] = (np.arange(len(cells)) - np.repeat(starts, counts) + np.repeat(first, counts)) % folds
    fold[np.repeat(counts == 1, counts)] = -1
    return fold[cell.ravel()]


def _deal_together(annotations: Annotations, together: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold (N,) of each annotation, the same for all pairs with the same value in `together` (P,); -1 for those of
    a user who would have nothing else to be trained on."""
    values, value = np.unique(together, return_inverse=True)
    fold = (rng.permutation(len(values)) % folds)[value][annotations.pair]
    counts = np.bincount(annotations.user * folds + fold, minlength=len(annotations.users) * folds).reshape(-1, folds)
    alone = counts.max(1) == counts.sum(1)
    return np.where(alone[annotations.user], -1, fold)
