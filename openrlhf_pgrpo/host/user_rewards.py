"""From base rewards to the reward of each sample's user, for PPO's local reward model and for the server.

Axes: B samples, D base rewards.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openrlhf_pgrpo.models.backbone import read_config
from openrlhf_pgrpo.models.folder import SCALE, Folder, is_factorized
from openrlhf_pgrpo.models.users import MEAN, Users

REMEDIES = (
    "ask them with openrlhf-pgrpo elicit and give their profile by --reward.profiles, or pass --reward.unknown_user "
    f"{MEAN} for the reward of the average user"
)


class UserRewards:
    """Rewards of the users of a factorized reward model, and of users with profiles.

    Args:
        options: nested host arguments with unknown_user, profiles and normalize_enable.

    Attributes:
        folder: the reward model. users: whose coefficients are known.

    Raises:
        ValueError: as `Users` and `check_scale`.
    """

    def __init__(self, folder: Folder, options):
        self.folder, self.unknown = folder, options.unknown_user
        self.users = Users(folder, [Path(options.profiles)] if options.profiles else [], REMEDIES)
        check_scale(folder.name, options.normalize_enable, folder.config)
        # Mean and deviation of rewards over all users, from the evaluation in training.
        found = (getattr(folder.config, key) for key in SCALE) if options.normalize_enable else (0.0, 1.0)
        self.mean, self.std = found

    def __call__(self, base_rewards: np.ndarray, users: Sequence[str | None]) -> np.ndarray:
        """The reward (B,) float64 of each sample for its user, from base rewards (B, D); None is an unknown user.

        Raises:
            ValueError: an unknown user, unless `--reward.unknown_user mean`.
        """
        coefficients = self.users.of(users, self.unknown)
        return ((np.asarray(base_rewards, np.float64) * coefficients).sum(-1) - self.mean) / self.std


def check_scale(name: str, normalize: bool, config=None) -> None:
    """Raises ValueError if rewards are to be normalised, and the reward model, of whatever kind, does not say by what:
    `factorize` and `export-user` do not measure it, and the host would go on with 0 and 1."""
    if normalize and not all(hasattr(config or read_config(name), key) for key in SCALE):
        raise ValueError(
            f"--reward.normalize_enable needs a mean and deviation of rewards in {name}/config.json, got none: "
            "evaluate in training, with train_rm --eval.dataset, or leave the flag out"
        )


def factorized_folder(name: str | None, chat_template: str | None = None) -> Folder | None:
    """The factorized reward model in a folder or under a hub name; None if it is another kind of model, or no name.

    Args:
        chat_template: as `Folder`.
    """
    if name is None or not is_factorized(read_config(name)):
        return None
    return Folder(name, chat_template)
