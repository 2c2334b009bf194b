"""Estimators that others have published, as contenders of the labs (docs/relatives.md). They are not in the add-on.

Each is made for S seeds and G preference groups, and called once per step with rewards (S, P, N) and the preference
groups (S, P) of their prompts. It returns advantages (S, P, N), before the host's clip. Seeds never meet.

    q       a prompt, mean_q the mean of its N samples
    s2, t2  variances of all rewards and of prompt means so far, over the history that a class names
"""

import numpy as np


def whitened(x: np.ndarray) -> np.ndarray:
    """Each seed's batch with mean 0 and variance 1, as the host does it."""
    return (x - x.mean((1, 2), keepdims=True)) / np.sqrt(np.maximum(x.var((1, 2), keepdims=True), 1e-8))


class Moments:
    """Count, mean and variance of all values so far, for each row; rows count from 0."""

    def __init__(self, rows: int):
        self.count, self.mean, self.squares = np.zeros((3, rows))

    def add(self, row: np.ndarray, x: np.ndarray) -> None:
        """Adds values x to the rows of the same shape (Chan et al. 1979 for a batch at once)."""
        row, x, size = row.ravel(), x.ravel(), len(self.count)
        count = np.bincount(row, minlength=size)
        mean = np.bincount(row, x, size) / np.maximum(count, 1)
        squares = np.bincount(row, np.square(x - mean[row]), size)
        off, total = mean - self.mean, np.maximum(self.count + count, 1)
        self.squares += squares + np.square(off) * self.count * count / total
        self.mean += off * count / total
        self.count += count

    @property
    def variance(self) -> np.ndarray:
        return self.squares / np.maximum(self.count - 1, 1)


class EBPO:
    """V = (1-S) mean_q + S mean, S = (s2/N) / (s2/N + t2); the history is updated first, and has R itself in it
    (arXiv 2602.05165). A is R - V, whitened over the batch; all prompts share one history."""

    def __init__(self, seeds: int, groups: int):
        self.rewards, self.means = Moments(seeds * groups), Moments(seeds * groups)
        self.first = groups * np.arange(seeds)[:, None]

    def histories(self, label: np.ndarray) -> np.ndarray:
        """The history (S, P) of each prompt."""
        return np.broadcast_to(self.first, label.shape)

    def __call__(self, rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
        row, mean = self.histories(label), rewards.mean(-1)
        self.rewards.add(np.broadcast_to(row[..., None], rewards.shape), rewards)
        self.means.add(row, mean)
        noise, between = self.rewards.variance[row] / rewards.shape[-1], self.means.variance[row]
        shrunk = noise / np.maximum(noise + between, 1e-12)
        value = (1 - shrunk) * mean + shrunk * self.rewards.mean[row]
        return self.scaled(rewards - value[..., None], row)

    def scaled(self, x: np.ndarray, row: np.ndarray) -> np.ndarray:
        return whitened(x)


class EBPOPerGroup(EBPO):
    """EBPO with a history for each preference group, over the standard deviation of that group's rewards."""

    def histories(self, label: np.ndarray) -> np.ndarray:
        return self.first + label

    def scaled(self, x: np.ndarray, row: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.maximum(self.rewards.variance[row], 1e-8))[..., None]


class JSPO:
    """R - [(1-lam) RLOO + lam mean of the other prompts], lam = v2 / (v2 + b2), both over the other prompts of the
    batch: v2 is the mean of their variances / N, b2 the variance of their means (arXiv 2511.03710). No scale."""

    def __init__(self, seeds: int, groups: int):
        pass

    def __call__(self, rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
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


class LitePPO:
    """(R - mean_q) / standard deviation of the batch's rewards (arXiv 2508.08221)."""

    def __init__(self, seeds: int, groups: int):
        pass

    def __call__(self, rewards: np.ndarray, label: np.ndarray) -> np.ndarray:
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


RELATIVES = {"ebpo": EBPO, "ebpo_per_group": EBPOPerGroup, "jspo": JSPO, "lite_ppo": LitePPO, "rae": RAE}
