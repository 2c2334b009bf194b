"""Estimators that others have published, as contenders of the labs (docs/relatives.md). They are not in the add-on.

Each is made for S seeds and G preference groups, and called once per step with rewards (S, P, N) and the preference
groups (S, P) of their prompts. It returns advantages (S, P, N), before the host's clip. Seeds never meet.

    q       a prompt, mean_q the mean of its N samples
    s2, t2  variances of all rewards and of prompt means so far, over the history that a class names
"""

import numpy as np

from openrlhf_pgrpo.core.history import RewardHistory


def whitened(x: np.ndarray) -> np.ndarray:
    """Each seed's batch with mean 0 and variance 1, as the host does it, which counts tokens instead of samples."""
    return (x - x.mean((1, 2), keepdims=True)) / np.sqrt(np.maximum(x.var((1, 2), keepdims=True), 1e-8))


class EBPO:
    """V = (1-S) mean_q + S mean, S = (s2/N) / (s2/N + t2); the history is updated first, and has R itself in it
    (arXiv 2602.05165). A is R - V, whitened over the batch; all prompts share one history."""

    def __init__(self, seeds: int, groups: int):
        self.rewards, self.means = RewardHistory(), RewardHistory()
        for history in (self.rewards, self.means):
            history.rows([*map(str, range(seeds * groups))])
        self.first = groups * np.arange(seeds)[:, None]

    def histories(self, label: np.ndarray) -> np.ndarray:
        """The history (S, P) of each prompt."""
        return np.broadcast_to(self.first, label.shape)

    def __call__(self, rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
        row, mean = self.histories(label), rewards.mean(-1)
        self.rewards.update(np.broadcast_to(row[..., None], rewards.shape).ravel(), rewards.ravel())
        self.means.update(row.ravel(), mean.ravel())
        noise, between = self.variance(self.rewards)[row] / rewards.shape[-1], self.variance(self.means)[row]
        shrunk = noise / np.maximum(noise + between, 1e-12)
        value = (1 - shrunk) * mean + shrunk * self.rewards.mean[row]
        return self.scaled(rewards - value[..., None], row)

    @staticmethod
    def variance(history: RewardHistory) -> np.ndarray:
        return np.square(history.moments.std(ddof=1))

    def scaled(self, x: np.ndarray, row: np.ndarray) -> np.ndarray:
        return whitened(x)


class EBPOPerGroup(EBPO):
    """EBPO with a history for each preference group, over the standard deviation of that group's rewards."""

    def histories(self, label: np.ndarray) -> np.ndarray:
        return self.first + label

    def scaled(self, x: np.ndarray, row: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.maximum(self.variance(self.rewards)[row], 1e-8))[..., None]


def jspo(rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
    """R - [(1-lam) RLOO + lam mean of the other prompts], lam = v2 / (v2 + b2), both over the other prompts of the
    batch: v2 is the mean of their variances / N, b2 the variance of their means (arXiv 2511.03710). No scale."""
    samples, prompts = rewards.shape[-1], rewards.shape[1]
    others, mean = prompts - 1, rewards.mean(-1)
    noise = rewards.var(-1, ddof=1) / samples
    v2 = (noise.sum(1, keepdims=True) - noise) / others
    elsewhere = (mean.sum(1, keepdims=True) - mean) / others
    # The variance of all means but one, from all of them.
    squares = np.square(mean - mean.mean(1, keepdims=True))
    b2 = (squares.sum(1, keepdims=True) - squares * prompts / others) / np.maximum(others - 1, 1)
    lam = (v2 / np.maximum(v2 + b2, 1e-12))[..., None]
    loo = (rewards.sum(-1, keepdims=True) - rewards) / (samples - 1)
    return rewards - (1 - lam) * loo - lam * elsewhere[..., None]


def lite_ppo(rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(R - mean_q) / standard deviation of the batch's rewards (arXiv 2508.08221)."""
    scale = rewards.std((1, 2), ddof=1, keepdims=True)
    return (rewards - rewards.mean(-1, keepdims=True)) / (scale + 1e-9)


class RAE:
    """R - b, where b is the moving average of the preference group's rewards, updated first, sample by sample; it
    begins at 0 (arXiv 2506.24119, there with a player for the group). No scale."""

    DECAY = 0.95

    def __init__(self, seeds: int, groups: int):
        self.average = np.zeros((seeds, groups))

    def __call__(self, rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
        seeds, advantages = np.arange(len(rewards)), np.empty_like(rewards)
        for prompt in range(rewards.shape[1]):
            for sample in range(rewards.shape[2]):
                now, group = rewards[:, prompt, sample], label[:, prompt]
                self.average[seeds, group] += (1 - self.DECAY) * (now - self.average[seeds, group])
                advantages[:, prompt, sample] = now - self.average[seeds, group]
        return advantages


RELATIVES = {
    "ebpo": EBPO,
    "ebpo_per_group": EBPOPerGroup,
    "jspo": lambda seeds, groups: jspo,
    "lite_ppo": lambda seeds, groups: lite_ppo,
    "rae": RAE,
}
