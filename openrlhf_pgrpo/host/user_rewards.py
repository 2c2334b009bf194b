"""From base rewards to the reward of each sample's user, for PPO's local reward model and for the server.

Axes: B samples, U users, D base rewards.
"""

from pathlib import Path
from typing import Sequence

import numpy as np
from transformers import AutoConfig

from openrlhf_pgrpo.core.elicitation import Profile
from openrlhf_pgrpo.host.reward_options import ERROR, MEAN
from openrlhf_pgrpo.models.factorized_reward import Folder, is_factorized


class UserRewards:
    """The coefficients of a factorized reward model's users, and of those in profiles.

    Args:
        options: nested host arguments with unknown_user, profiles and normalize_enable.

    Raises:
        ValueError: a profile that was made for another model, or for a user of this one.
    """

    def __init__(self, folder: Folder, options):
        self.folder, self.unknown = folder, options.unknown_user
        self.coefficients, users = folder.coefficients, list(folder.users)
        self.average = self.coefficients.mean(0)
        for path in sorted(Path(options.profiles).glob("*.json")) if options.profiles else ():
            profile = Profile.load(path, folder.fingerprint)
            if profile.user in users:
                raise ValueError(f"{path} needs to be of a user who is not known yet, got {profile.user!r}: remove it")
            users.append(profile.user)
            self.coefficients = np.vstack([self.coefficients, profile.coefficients])
        self.rows = {user: row for row, user in enumerate(users)}
        # What evaluation in training left: mean and deviation of rewards, over all users.
        mean, std = getattr(folder.config, "mean", 0.0), getattr(folder.config, "std", 1.0)
        self.mean, self.std = (mean, std) if options.normalize_enable else (0.0, 1.0)

    def __call__(self, base_rewards: np.ndarray, users: Sequence[str | None]) -> np.ndarray:
        """Rewards (B,) float64 of base rewards (B, D), as the users (B,) give them; None is nobody.

        Raises:
            ValueError: an unknown user, unless `--reward.unknown_user mean`.
        """
        lost = [user for user in users if user not in self.rows]
        if lost and self.unknown == ERROR:
            raise ValueError(
                f"every sample needs a user of the reward model {self.folder.name}, got {lost[0]!r} ({len(lost)} of "
                f"{len(users)} samples): name a user of its {len(self.rows)}, give a profile by --reward.profiles, or "
                f"pass --reward.unknown_user {MEAN} for the reward of the average user"
            )
        coefficients = np.array([self.coefficients[self.rows[u]] if u in self.rows else self.average for u in users])
        return ((np.asarray(base_rewards, np.float64) * coefficients).sum(-1) - self.mean) / self.std


def factorized_folder(name: str | None) -> Folder | None:
    """The factorized reward model of that folder or hub name; None if it names another kind, or nothing."""
    if name is None or not is_factorized(AutoConfig.from_pretrained(name, trust_remote_code=True)):
        return None
    return Folder(name)
