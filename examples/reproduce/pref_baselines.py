"""What reward factorization is compared with in pref_jester.py and pref_attributes.py.

    shared      one reward for all: Bradley-Terry
    simplex     coefficients that are a softmax, as LoRe's (arXiv 2504.14439)
    per_user    one model for each user, fitted to that user's answers alone
    released    the question rule of the released code of arXiv 2503.06358

Axes: U users, P pairs, D base rewards, H embedding dimensions.
"""

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.special import softmax

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.differences import scaled
from openrlhf_pgrpo.core.factorization import Factorization, check_overlap, start
from openrlhf_pgrpo.core.optimum import Problem, by_user, check_l2, descend
from openrlhf_pgrpo.core.posterior import Prior, posteriors, slope

NUMBERS_AT_ONCE = 10**7  # in the Gram matrices of `per_user`


def shared(X, annotations: Annotations, l2: float) -> Factorization:
    """One base reward and coefficients of 1 for everybody; arguments as those of `fit`."""
    check_l2(l2)
    problem, ones = Problem.of(X, annotations), np.ones((len(annotations.users), 1))

    def penalised(head):
        loss, by_head, _ = problem.loss_and_slopes(head[None], ones)
        return loss + l2 / 2 * (head @ head), by_head[0] + l2 * head

    head = descend(penalised, np.zeros(problem.X.shape[1]), l2)
    return Factorization((head @ problem.basis)[None], ones, list(annotations.users))


def simplex(X, annotations: Annotations, factors: int, l2: float) -> Factorization:
    """Coefficients that are a softmax, whose logits are penalised; arguments as those of `fit`."""
    check_l2(l2)
    check_overlap(X, annotations)
    problem = Problem.of(X, annotations)
    size = factors * problem.X.shape[1]

    def parts(numbers):
        return numbers[:size].reshape(factors, -1), numbers[size:].reshape(-1, factors)

    def penalised(numbers):
        head, table = parts(numbers)
        weights = softmax(table, axis=1)
        loss, by_head, by_weights = problem.loss_and_slopes(head, weights)
        by_table = weights * (by_weights - (weights * by_weights).sum(1)[:, None])
        slope = np.concatenate([by_head.ravel(), by_table.ravel()])
        return loss + l2 / 2 * (numbers @ numbers), slope + l2 * numbers

    # The search starts with one base reward for each of D clusters of users, who lean to their own.
    head, coefficients = start(problem, annotations, factors)
    centres, cluster = kmeans2(coefficients, factors, minit="++", rng=0)
    first = np.concatenate([(centres @ head).ravel(), 2.0 * np.eye(factors)[cluster].ravel()])
    head, table = parts(descend(penalised, first, l2))
    return Factorization(head @ problem.basis, softmax(table, axis=1), list(annotations.users))


def per_user(X: np.ndarray, annotations: Annotations, l2: float) -> np.ndarray:
    """Heads (U, H), each fitted to its user's annotations alone; arguments as those of `fit`.

    A head is a sum of its user's n pairs, so the search is for n numbers and not for H.
    """
    X, scale = scaled(X, annotations)
    _, pair, preference, starts = by_user(annotations)
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
        prior = Prior(np.zeros(len(place)), np.eye(len(place)) / l2)
        found, _ = posteriors(axes * lengths[:, None], preference[rows], prior)  # padded pairs have features of 0
        found = np.divide(found, lengths, out=np.zeros_like(found), where=values > 1e-10 * values[:, -1:])
        heads[chunk] = np.einsum("unk,uk,unh->uh", axes, found, own, optimize=True)
    return heads / scale


def released(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """s'(v.lambda)^2 v'M^-1 v (P,), the variance of the predicted probability by the delta method.

    `mean` and `variance` (P,) are those of the logits. The released code has M = 0.001 I plus the sum of s' v v' over
    the answers, so Prior(0, 1000 I) is its prior.
    """
    return np.square(slope(mean)) * variance
