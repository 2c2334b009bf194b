"""Made-up annotations for the tests of factorization, and a prior for those of new users."""

import numpy as np
from scipy.sparse import csr_matrix

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.posterior import Prior


def names(users):
    return [f"user {u:03}" for u in range(users)]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def world(users=40, pairs=60, dimensions=8, rewards=2, share=0.5, seed=0, strength=3.0):
    """X (P, H), annotations of a share of all cells, and the true logits (P, U)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(pairs, dimensions))
    logits = X @ rng.normal(size=(dimensions, rewards)) @ rng.normal(size=(rewards, users))
    logits *= strength / logits.std()
    user, pair = np.nonzero(rng.random((users, pairs)) < share)
    preference = (rng.random(len(user)) < sigmoid(logits[pair, user])).astype(float)
    return X, Annotations(user, pair, preference, names(users)), logits


def world_of_texts(texts=20, dimensions=6):
    """Embeddings of texts (T, H), annotations of pairs of them, and the texts of each pair. One dimension is the same
    for all."""
    rng = np.random.default_rng(3)
    embeddings = rng.normal(4, 1, (texts, dimensions))
    embeddings[:, 2] = 0.1
    first, second = np.triu_indices(texts, 1)
    logits = (embeddings[first] - embeddings[second]) @ rng.normal(size=(dimensions, 30))
    user, pair = np.nonzero(rng.random((30, len(first))) < 0.3)
    preference = (rng.random(len(user)) < sigmoid(logits[pair, user])).astype(float)
    return embeddings, Annotations(user, pair, preference, names(30)), first, second


def square(X):
    """Mean square length of the rows: the unit of the penalty."""
    return np.square(X).sum(1).mean()


def gradient(X, known, theta):
    """Gradient of the sum of cross-entropies by theta (U, H), where the logit is theta[user] . X[pair]; by a loop."""
    found = np.zeros_like(theta)
    for user, pair, preference in zip(known.user, known.pair, known.preference):
        found[user] += (sigmoid(theta[user] @ X[pair]) - preference) * X[pair]
    return found


def one_hot(pairs, items):
    rows = np.arange(len(pairs)).repeat(2)
    return csr_matrix((np.tile([1.0, -1.0], len(pairs)), (rows, np.ravel(pairs))), (len(pairs), items))


def some_prior(rng, rewards):
    root = rng.normal(0, 1, (rewards, rewards))
    return Prior(rng.normal(0, 1, rewards), root @ root.T + 0.1 * np.eye(rewards))
