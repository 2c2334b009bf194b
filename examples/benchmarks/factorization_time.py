"""How long the fast path of the factorized reward model takes, and how much memory: frozen embeddings, made-up users.

    python examples/benchmarks/factorization_time.py [--largest 1000000] [--factors 6] [--l2 3] [--choice 20000]

Users prefer answers by 6 hidden base rewards of random embeddings of 384 numbers, as many as MiniLM gives, whose
variances fall as 1/k. There are 20,000 pairs, or as many as annotations if these are fewer. `fit` includes the checks,
the signed SVD, the joint fit and the canonical form. Seconds are processor time of one thread. Megabytes are the peak
of a separate process: "data" before the fit (Python, libraries, embeddings and annotations) and "peak" at its end.
"agreement" is how often the fitted sign of a random pair for a random user is the true one. The last line is the
choice of the number of base rewards, of 1 to 8, and of the penalty, for --choice users of four pairs each.
"""

import argparse
import multiprocessing
import os
import resource
import time

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before numpy is loaded

import numpy as np  # noqa: E402

from openrlhf_pgrpo.core.annotations import Annotations  # noqa: E402
from openrlhf_pgrpo.core.cross_validation import choose_factors  # noqa: E402
from openrlhf_pgrpo.core.factorization import fit  # noqa: E402

DIMENSIONS, HIDDEN, MOST_PAIRS = 384, 6, 20_000
HEAD = ("annotations", "users", "seconds", "data MB", "peak MB", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=10**6, help="most annotations: 10,000, 100,000, ... up to this")
    parser.add_argument("--factors", type=int, default=HIDDEN)
    parser.add_argument("--l2", type=float, default=3.0)
    parser.add_argument("--choice", type=int, default=20_000, help="users among whom the number is chosen")
    args = parser.parse_args()
    print("".join(f"{name:>12}" for name in HEAD))
    for annotations in (10**k for k in range(4, 9) if 10**k <= args.largest):
        for users in (10**k for k in range(2, 6) if 10 ** (k + 1) <= annotations):  # at least 10 annotations each
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, before, peak, agreement = pool.apply(measure, (annotations, users, args.factors, args.l2))
            line = f"{annotations:12}{users:12}{seconds:12.1f}{before:12.0f}{peak:12.0f}{agreement:12.3f}"
            print(line, flush=True)
    factors, seconds = choose(args.choice)
    print(f"\nchoice among {args.choice} users of four pairs each: {factors} base rewards, {seconds:.1f} seconds")


def measure(annotations: int, users: int, factors: int, l2: float) -> tuple[float, float, float, float]:
    """Seconds, megabytes before and at the peak, agreement."""
    rng = np.random.default_rng(0)
    user = np.concatenate([np.arange(users), rng.integers(users, size=annotations - users)])
    X, features, coefficients, known = people(user, rng)
    before, start = peak_megabytes(), time.process_time()
    found = fit(X, known, factors, l2)
    seconds, peak = time.process_time() - start, peak_megabytes()
    rows, pair = rng.integers(users, size=100_000), rng.integers(len(X), size=100_000)
    truth = np.einsum("nd,nd->n", features[pair], coefficients[rows]) > 0
    return seconds, before, peak, ((found.predict(X[pair], rows) > 0.5) == truth).mean()


def choose(users: int) -> tuple[int, float]:
    """The number of base rewards that is chosen, and seconds."""
    X, _, _, known = people(np.repeat(np.arange(users), 4), np.random.default_rng(0))
    start = time.process_time()
    return choose_factors(X, known).recommended, time.process_time() - start


def people(user: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, Annotations]:
    """X (P, H), the true base rewards of the pairs and coefficients of the users, and an annotation of each `user`
    (N,)."""
    users, pairs = user.max() + 1, min(len(user), MOST_PAIRS)
    lengths = 1 / np.sqrt(1 + np.arange(DIMENSIONS))
    X = rng.normal(size=(pairs, DIMENSIONS)) * (lengths / np.linalg.norm(lengths))
    features, coefficients = X @ rng.normal(size=(DIMENSIONS, HIDDEN)), rng.normal(size=(users, HIDDEN))
    pair = rng.integers(pairs, size=len(user))
    p = 1 / (1 + np.exp(-np.einsum("nd,nd->n", features[pair], coefficients[user])))
    chosen = (rng.random(len(user)) < p).astype(float)
    return X, features, coefficients, Annotations(user, pair, chosen, [f"user {number}" for number in range(users)])


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
