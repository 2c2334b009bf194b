"""Which signal may steer group-robust weights online? Two preference groups share one small policy.

    python examples/group_robust_signals.py [--seeds 10] [--steps 400] [--prompts 64] [--samples 8]

The bandit of arXiv 2405.20304 made online: a prompt is x ~ U[0,1]^2, and one of 8 actions is chosen by a softmax
policy of four numbers. The minority (a fifth of the prompts) and the majority want opposite numbers, so the policy has
to choose whom to serve. It is trained by policy gradient on rewards minus their mean per prompt; only weights differ:

    none         all advantages as they are
    importance   fixed: both preference groups count the same, whatever their size
    quantiles, bounds, excess, improvement    `--robust.signal` of `group_robust`; improvement is MT-GRPO's
    raw, surrogate    tempting alternatives: the negative mean reward, and the loss of the policy update

The cases change the scale of the rewards, not the best policy: the majority's times 5, or the minority's less 10. The
script prints numbers of the end of training, with standard errors over seeds: the regret (0: all that it can have, 1:
the worst) of the group that is worse off, the mean of both, and the minority's alpha and the largest, which is 1 where
weights have collapsed onto one group.
"""

import argparse
import json

import numpy as np

from openrlhf_pgrpo.core.estimator import RewardBatch
from openrlhf_pgrpo.core.group_robust import GroupRobust
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.signals import SIGNALS, Signal, SignalOptions

TASTE = np.array([[1.0, 3.0, 1.0, 3.0], [3.0, 1.0, 3.0, 1.0]])  # minority, majority
SHARE, ACTIONS, RATE, ETA = 0.2, 8, 0.5, 0.5
NAMES = ("minority", "majority")
CASES = {  # scale and offset of the minority's rewards, and of the majority's
    "equal": ((1, 0), (1, 0)),
    "majority x5": ((1, 0), (5, 0)),
    "minority -10": ((1, -10), (1, 0)),
}


class Raw(Signal):
    def __call__(self, batch, means):
        return -means


class Surrogate(Signal):
    """The loss of the policy update at its own samples: ratio 1 times the centred advantage."""

    def __call__(self, batch, means):
        prompts, codes = batch.prompt_groups, batch.pref_group_codes
        advantages = batch.rewards - (np.bincount(prompts, batch.rewards) / np.bincount(prompts))[prompts]
        return -np.bincount(codes, advantages) / np.bincount(codes)


TRAPS = {"raw": Raw, "surrogate": Surrogate}
METHODS: dict[str, dict] = {  # options of weights and signal
    "none": {},
    "importance": {"chi": 0.0},
    **{signal: {"signal": signal} for signal in SIGNALS},
    **{f"{signal}, eta 0.1": {"signal": signal, "eta": 0.1} for signal in ("quantiles", "bounds")},
    **{f"improvement, lambda {x:g}": {"signal": "improvement", "improvement_lambda": x} for x in (0.0, 0.2)},
    **{trap: {} for trap in TRAPS},
}


def features(x, pref_group):
    """phi (..., 8, 4) of prompts x (..., 2) of the preference groups (...): as the paper has it."""
    a = np.arange(ACTIONS) / ACTIONS + 1
    angle = np.pi * x[..., None, :].repeat(2, -1)  # (..., 1, 4): phi_0 and phi_1 of x_0, phi_2 and phi_3 of x_1
    own = np.arange(4) % 2 == np.asarray(pref_group)[..., None, None]
    return np.where(own, a[:, None] * np.cos(angle), np.sin(angle) / a[:, None])


def policy(phi, theta):
    """Probabilities (S, P, 8) of the actions under theta (S, 4)."""
    logits = np.einsum("spak,sk->spa", phi, theta)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class World:
    """Prompts to test on: true rewards of every action, for each preference group."""

    def __init__(self, seed=0, states=500):
        x = np.random.default_rng(seed).random((states, 2))
        self.phi = np.stack([features(x, np.full(states, g)) for g in (0, 1)])  # (2, states, 8, 4)
        self.reward = np.einsum("gpak,gk->gpa", self.phi, TASTE)
        self.low, self.high = self.reward.min(-1).mean(-1), self.reward.max(-1).mean(-1)

    def regret(self, theta):
        """The regret (S, 2) of each seed and preference group."""
        p = np.stack([policy(np.repeat(phi[None], len(theta), 0), theta) for phi in self.phi], 1)
        earned = (p * self.reward).sum(-1).mean(-1)
        return (self.high - earned) / (self.high - self.low)


def weigher(method, world, case):
    """The `GroupRobust` of one seed; None where samples have no weights."""
    if method == "none":
        return None
    given = {"eta": ETA, "signal": "quantiles", **METHODS[method]}
    options = RobustOptions(**{name: given.pop(name) for name in ("eta", "chi") if name in given})
    if given["signal"] == "bounds":
        shapes = zip(NAMES, CASES[case], world.low, world.high)
        given["bounds"] = json.dumps(
            {name: [scale * low + shift, scale * high + shift] for name, (scale, shift), low, high in shapes}
        )
    signal = TRAPS.get(method, SIGNALS[given["signal"]])(SignalOptions(**given))
    return GroupRobust(options, signal)


def train(method, case, seeds, steps, prompts, samples, world):
    """Regret (S, 2) and alpha (S, 2) at the end, minority and majority; alpha is NaN where samples have no weights."""
    rngs = [np.random.default_rng([2021, seed]) for seed in range(seeds)]
    theta, robust = np.zeros((seeds, 4)), [weigher(method, world, case) for _ in rngs]
    scale, shift = np.array(CASES[case], float).T
    prompt_groups = np.repeat(np.arange(prompts), samples)
    for _ in range(steps):
        x = np.stack([rng.random((prompts, 2)) for rng in rngs])
        group = (np.stack([rng.random(prompts) for rng in rngs]) > SHARE).astype(int)  # (S, P)
        dice = np.stack([rng.random((prompts, samples)) for rng in rngs])
        phi = features(x, group)
        p = policy(phi, theta)
        action = (dice[..., None] > p.cumsum(-1)[:, :, None, :-1]).sum(-1)  # (S, P, n)
        chosen = np.take_along_axis(phi, action[..., None], 2)  # (S, P, n, 4)
        reward = np.einsum("spnk,spk->spn", chosen, TASTE[group])
        reward = scale[group][..., None] * reward + shift[group][..., None]
        advantage = reward - reward.mean(-1, keepdims=True)
        for seed, weights in enumerate(robust):
            if weights is not None:
                names = np.array(NAMES)[np.repeat(group[seed], samples)].tolist()
                nobody = [None] * len(names)
                batch = RewardBatch(reward[seed].ravel(), prompt_groups, names, nobody, nobody)
                advantage[seed] *= weights(batch).reshape(prompts, samples)
        score = chosen - np.einsum("spa,spak->spk", p, phi)[:, :, None]
        theta = theta + RATE * np.einsum("spn,spnk->sk", advantage, score) / (prompts * samples)
    alpha = [np.full(2, np.nan) if r is None else r.weights.alpha[r.weights.rows(NAMES)] for r in robust]
    return world.regret(theta), np.array(alpha)


def with_error(values):
    return f"{values.mean():.3f} +- {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seeds", 10), ("steps", 400), ("prompts", 64), ("samples", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = vars(parser.parse_args(argv))
    for name, least in (("seeds", 2), ("steps", 1), ("prompts", 1), ("samples", 2)):  # one answer has no advantage
        if args[name] < least:
            parser.error(f"--{name} needs at least {least}, got {args[name]}")
    world = World()
    titles = ("worst regret", "mean regret", "minority alpha", "largest alpha")
    print(f"{'case':14}{'weights':26}" + "".join(f"{title:18}" for title in titles))
    for case in CASES:
        for method in METHODS:
            regret, alpha = train(method, case, **args, world=world)
            values = [regret.max(1), regret.mean(1)] + ([] if method == "none" else [alpha[:, 0], alpha.max(1)])
            print(f"{case:14}{method:26}" + "".join(f"{with_error(value):18}" for value in values), flush=True)


if __name__ == "__main__":
    main()
