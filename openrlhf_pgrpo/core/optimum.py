"""The head and the coefficients that cost least: the search behind a factorization.

Given the head, the coefficients of each user are a convex problem of their own, of D numbers. So the search is for the
head alone (variable projection, Golub and Pereyra 1973): Newton's method gives everybody's best coefficients for each
head that L-BFGS tries. Searching for both at once needs 3 to 15 times as many heads.

Axes: U users, P pairs, D base rewards, H embedding dimensions, N annotations, r independent dimensions of embeddings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, identity, issparse
from scipy.special import expit

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.differences import Differences, scaled

ITERATIONS = 5000
MOST_STEPS = 100  # of Newton's method; five are usual
LAST_STEP = 1e-3  # A step that changes no logit by more is the last: what it leaves is of the order of its square.


class Problem(NamedTuple):
    """What the search works on: embeddings of unit scale, and annotations in the order of users.

    Attributes:
        X: (P, r) differences of embeddings with a mean square length of 1. Those that are not sparse have orthogonal
            columns: a penalised head never leaves the span of the embeddings, and where H is above P or there are few
            items, the search inside that span is much faster. A sparse X keeps its columns.
        squares: (r,) the sum of squares of each column of X.
        basis: (r, H), turns a head for X into one for the embeddings.
        user, pair, preference: (N,), as in the annotations. starts: (U + 1,) where the annotations of each user
            begin, and the end.
    """

    X: Any
    squares: np.ndarray
    basis: Any
    user: np.ndarray
    pair: np.ndarray
    preference: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, X, annotations: Annotations) -> "Problem":
        X, scale = scaled(X, annotations)
        if issparse(X):
            squares = np.asarray(X.power(2).sum(0)).ravel()
            return cls(X, squares, identity(X.shape[1]) / scale, *by_user(annotations))
        if not isinstance(X, Differences):
            X = Differences(X, identity(X.shape[0], format="csr"))
        values, axes = np.linalg.eigh(X.products())
        independent = values > 1e-10 * values[-1]
        axes = axes[:, independent]
        return cls(X.times(axes), values[independent], axes.T / scale, *by_user(annotations))

    def of_others(self, annotations: Annotations) -> "Problem":
        """The same embeddings with other annotations."""
        return Problem(self.X, self.squares, self.basis, *by_user(annotations))

    def by_users(self, values: np.ndarray) -> csr_matrix:
        """A number for each annotation, (N,), as a matrix (U, P)."""
        return csr_matrix((values, self.pair, self.starts), shape=(len(self.starts) - 1, self.X.shape[0]))

    def logits(self, features: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """The logit (N,) of each annotation, from pair features (P, D) and coefficients (U, D)."""
        return logits(features, coefficients, self.pair, self.user)

    def loss_and_slopes(self, head: np.ndarray, coefficients: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The sum of cross-entropies, and its slopes by head (D, r) and by coefficients (U, D)."""
        features = self.X @ head.T
        z = self.logits(features, coefficients)
        residual = self.by_users(expit(z) - self.preference)
        return (
            cross_entropy(z, self.preference),
            (self.X.T @ (residual.T @ coefficients)).T,
            residual @ features,
        )

    def of_users(self, some: np.ndarray) -> "Problem":
        """That of some users alone, for a mask (U,)."""
        own, counts = some.repeat(np.diff(self.starts)), np.diff(self.starts)[some]
        user, starts = np.arange(len(counts)).repeat(counts), np.concatenate([[0], np.cumsum(counts)])
        return self._replace(user=user, pair=self.pair[own], preference=self.preference[own], starts=starts)

    def best_coefficients(self, features: np.ndarray, first: np.ndarray, l2: float) -> np.ndarray:
        """The coefficients (U, D) that minimise the loss with these pair features (P, D).

        Args:
            first: (U, D) where Newton's method begins, for those users to whom it is better than coefficients of 0.

        Raises:
            ArithmeticError: no convergence.
        """
        factors = features.shape[1]
        row, column = np.triu_indices(factors)
        place = np.empty((factors, factors), int)  # of each product of two features in the columns of `products`
        place[row, column] = place[column, row] = np.arange(len(row))
        products = features[:, row] * features[:, column]
        own, counts = features.take(self.pair, 0), np.diff(self.starts)
        z, penalty = self.logits(features, first), l2 * np.eye(factors)
        losses = np.add.reduceat(np.logaddexp(0, z) - self.preference * z, self.starts[:-1])
        # From 0 it is never far. From a bad start it can be, with slopes that are all but 0 on the way.
        better = losses + l2 / 2 * np.square(first).sum(1) < np.log(2) * counts
        coefficients = np.where(better[:, None], first, 0.0)
        z = np.where(better.repeat(counts), z, 0.0)
        for _ in range(MOST_STEPS):
            chance = expit(z)
            pull = self.by_users(self.preference - chance) @ features - l2 * coefficients
            hessian = (self.by_users(chance * (1 - chance)) @ products).take(place, 1) + penalty
            step = np.linalg.solve(hessian, pull[..., None])[..., 0]
            turn = np.einsum("nd,nd->n", own, step.repeat(counts, 0))  # change of the logits
            # Of a step that changes a logit by `reach`, log(1 + reach) / reach is sure to lower the loss: see
            # `posterior._step_fractions`.
            reach = np.maximum.reduceat(np.abs(turn), self.starts[:-1])
            part = np.divide(np.log1p(reach), reach, out=np.ones_like(reach), where=reach > 0)
            coefficients += part[:, None] * step
            z += part.repeat(counts) * turn
            moving = reach >= LAST_STEP
            if not moving.any():
                return coefficients
            if moving.mean() < 0.5:  # the others have arrived
                rest = self.of_users(moving)
                coefficients[moving] = rest.best_coefficients(features, coefficients[moving], l2)
                return coefficients
        raise ArithmeticError(f"coefficients need to converge in {MOST_STEPS} steps, got no end: raise l2, now {l2:g}")


def minimum(problem: Problem, head: np.ndarray, coefficients: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """The head (D, r) and coefficients (U, D) that minimise the loss, not yet in canonical form. Of the start, only
    its product matters.

    Raises:
        ValueError: l2 is not a finite number above 0.
        ArithmeticError: no convergence.
    """
    check_l2(l2)
    head, coefficients = strongest(head, coefficients, len(head))
    # The search is for numbers in which the loss is about equally curved: a logit's curvature is 1/4 at most.
    strength = np.square(coefficients).T @ np.diff(problem.starts) / (4 * problem.X.shape[0])
    lengths = np.sqrt(strength[:, None] * problem.squares + l2)

    def penalised(numbers):
        nonlocal coefficients  # near those of the next head
        head = numbers.reshape(lengths.shape) / lengths
        features = problem.X @ head.T
        coefficients = problem.best_coefficients(features, coefficients, l2)
        z = problem.logits(features, coefficients)
        residual = problem.by_users(expit(z) - problem.preference)
        by_head = (problem.X.T @ (residual.T @ coefficients)).T + l2 * head
        penalty = l2 / 2 * (np.square(head).sum() + np.square(coefficients).sum())
        return cross_entropy(z, problem.preference) + penalty, (by_head / lengths).ravel()

    head = descend(penalised, (head * lengths).ravel(), l2).reshape(lengths.shape) / lengths
    return head, problem.best_coefficients(problem.X @ head.T, coefficients, l2)


def descend(loss_and_slope: Callable[[np.ndarray], tuple[float, np.ndarray]], first: np.ndarray, l2: float):
    """The numbers that minimise a loss with this penalty, from the first ones, by L-BFGS-B.

    Raises:
        ArithmeticError: no convergence.
    """
    options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "maxcor": 20, "gtol": 1e-6, "ftol": 1e-11}
    found = minimize(loss_and_slope, first, jac=True, method="L-BFGS-B", options=options)
    if found.status == 1:
        raise ArithmeticError(
            f"the fit needs to converge in {ITERATIONS} iterations, got no end: raise l2, now {l2:g}"
        )
    return found.x


def strongest(head: np.ndarray, coefficients: np.ndarray, factors: int) -> tuple[np.ndarray, np.ndarray]:
    """The leading singular triplets of coefficients @ head as a head (D, r) and coefficients (U, D), each with the
    roots of the singular values: the cheapest form of the product, if D does not leave some out."""
    (left, inner), (right, outer) = np.linalg.qr(coefficients), np.linalg.qr(head.T)
    u, strengths, v = np.linalg.svd(inner @ outer.T)
    roots = np.sqrt(strengths[:factors])
    return (right @ v[:factors].T * roots).T, left @ u[:, :factors] * roots


def logits(features: np.ndarray, coefficients: np.ndarray, pair: np.ndarray, user: np.ndarray) -> np.ndarray:
    """The logit (N,) of each annotation, from pair features (P, D) and coefficients (U, D)."""
    return np.einsum("nd,nd->n", features[pair], coefficients[user])


def cross_entropy(z: np.ndarray, preference: np.ndarray) -> float:
    """Sum of the cross-entropies of logits z (N,)."""
    return np.logaddexp(0, z).sum() - preference @ z


def by_user(annotations: Annotations) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """user, pair and preference (N,) in the order of users, and where those of each user start (U + 1,)."""
    order = np.lexsort((annotations.pair, annotations.user))
    starts = np.concatenate([[0], np.cumsum(np.bincount(annotations.user, minlength=len(annotations.users)))])
    return annotations.user[order], annotations.pair[order], annotations.preference[order], starts


def check_l2(l2: float) -> None:
    """Raises ValueError unless this is a penalty."""
    if not 0 < l2 < np.inf:
        raise ValueError(f"l2 needs a finite number above 0, got {l2}: without it the factors have no definite scale")
