"""How long a person waits for the next question, and how long it takes to fit all users again.

    python examples/benchmarks/elicitation_time.py [--pool 10000] [--users 100000] [--rewards 8] [--repeats 30]

Median processor time of all threads. First one user, after 1 to 20 answers: "fit" is the posterior, "next" the next
question by expected information over the whole pool with the predictive entropy of the pool, by which a session stops,
and "all" the two together. Then all users in one call.
"""

import argparse
import time

import numpy as np

from openrlhf_pgrpo.core.posterior import Prior, posterior, posteriors
from openrlhf_pgrpo.core.questions import next_question

ANSWERS = (1, 5, 10, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=int, default=10_000, help="pairs")
    parser.add_argument("--users", type=int, default=100_000, help="users fitted in one call")
    parser.add_argument("--rewards", type=int, default=8, help="base rewards")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    prior = Prior.of(rng.normal(0.5, 1, (1000, args.rewards)))

    print(f"one user, a pool of {args.pool} pairs, {args.rewards} base rewards: milliseconds")
    print(f"{'answers':>8}" + "".join(f"{part:>9}" for part in ("fit", "next", "all")))
    pool = rng.normal(0, 1, (args.pool, args.rewards))
    for answers in ANSWERS:
        fit, ask = np.median([one_answer(pool, answers, prior, rng) for _ in range(args.repeats)], 0)
        print(f"{answers:8}" + "".join(f"{1e3 * seconds:9.3f}" for seconds in (fit, ask, fit + ask)))

    print(f"\n{args.users} users in one call: seconds")
    for answers in ANSWERS[2:]:
        seconds, _ = clock(posteriors, *people(args.users, answers, prior, rng), prior)
        print(f"{answers:8}{seconds:9.2f}", flush=True)


def clock(function, *args):
    """(seconds, result)"""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def people(users: int, answers: int, prior: Prior, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features (U, n, D) and answers (U, n) of users drawn from the prior."""
    features = rng.normal(0, 1, (users, answers, len(prior.mean)))
    coefficients = rng.multivariate_normal(*prior, users)
    logits = np.einsum("und,ud->un", features, coefficients)
    return features, (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def one_answer(pool: np.ndarray, answers: int, prior: Prior, rng: np.random.Generator) -> list[float]:
    """Seconds for fit and next question."""
    features, said = people(1, answers, prior, rng)
    fit, belief = clock(posterior, features[0], said[0], prior)
    ask, _ = clock(next_question, pool, belief, range(answers))
    return [fit, ask]


if __name__ == "__main__":
    main()
