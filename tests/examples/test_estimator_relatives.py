"""The published estimators in the lab are their formulas, written out sample by sample."""

import numpy as np
import pytest

from estimator_relatives import RELATIVES

pytestmark = pytest.mark.core

SEEDS, STEPS, PROMPTS, SAMPLES, GROUPS = 2, 3, 7, 3, 2


@pytest.fixture(scope="module")
def batches():
    """Rewards (S, P, N) and preference groups (S, P) of each step."""
    rng = np.random.default_rng(0)
    shape = (STEPS, SEEDS, PROMPTS)
    return [*zip(rng.normal(rng.normal(2, 3, (*shape, 1)), 1, (*shape, SAMPLES)), rng.integers(GROUPS, size=shape))]


def ebpo(batches, per_group):
    seen, means = {}, {}
    for rewards, label in batches:
        for owner, mine in zip(label * per_group, rewards):
            seen.setdefault(owner, []).extend(mine)
            means.setdefault(owner, []).append(mine.mean())
        advantages = np.empty_like(rewards)
        for q, owner in enumerate(label * per_group):
            noise, between = np.var(seen[owner], ddof=1) / SAMPLES, np.var(means[owner], ddof=1)
            share = noise / (noise + between)
            advantages[q] = rewards[q] - (1 - share) * rewards[q].mean() - share * np.mean(seen[owner])
            if per_group:
                advantages[q] /= np.std(seen[owner], ddof=1)
        yield advantages if per_group else (advantages - advantages.mean()) / advantages.std()


def jspo(batches):
    for rewards, _ in batches:
        advantages = np.empty_like(rewards)
        for q in range(PROMPTS):
            others = np.delete(rewards, q, 0)
            v2, b2 = (others.var(1, ddof=1) / SAMPLES).mean(), others.mean(1).var(ddof=1)
            lam = v2 / (v2 + b2)
            for i in range(SAMPLES):
                loo = np.delete(rewards[q], i).mean()
                advantages[q, i] = rewards[q, i] - (1 - lam) * loo - lam * others.mean()
        yield advantages


def lite_ppo(batches):
    for rewards, _ in batches:
        yield (rewards - rewards.mean(1, keepdims=True)) / rewards.std(ddof=1)


def rae(batches):
    average = dict.fromkeys(range(GROUPS), 0.0)
    for rewards, label in batches:
        advantages = np.empty_like(rewards)
        for q, owner in enumerate(label):
            for i, reward in enumerate(rewards[q]):
                average[owner] = 0.95 * average[owner] + 0.05 * reward
                advantages[q, i] = reward - average[owner]
        yield advantages


@pytest.mark.parametrize(
    "name, formula",
    {
        "ebpo": lambda batches: ebpo(batches, 0),
        "ebpo_per_group": lambda batches: ebpo(batches, 1),
        "jspo": jspo,
        "lite_ppo": lite_ppo,
        "rae": rae,
    }.items(),
)
def test_advantages_are_the_formula_sample_by_sample(name, formula, batches):
    estimator = RELATIVES[name](SEEDS, GROUPS)
    found = [estimator(*batch) for batch in batches]
    for seed in range(SEEDS):
        expected = formula([(rewards[seed], label[seed]) for rewards, label in batches])
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[seed], other, rtol=0, atol=1e-9)
