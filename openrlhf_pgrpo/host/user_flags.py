"""The flags about users in PPO and in the reward server: which users a factorized model serves, and how."""

from collections.abc import Mapping

from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.models.users import ERROR, MEAN


def add_user_flags(group) -> None:
    """Adds `--reward.unknown_user` and `--reward.profiles`."""
    group.add_argument(
        "--reward.unknown_user",
        choices=(ERROR, MEAN),
        default=ERROR,
        help="With a factorized reward model: what happens to a sample without a user, or of a user that the model "
        "does not know. error (default): training or the request ends. mean: it gets the reward of the average user.",
    )
    group.add_argument(
        "--reward.profiles",
        default=None,
        help="With a factorized reward model: a folder of profiles (*.json, made by openrlhf-pgrpo elicit) of users "
        "that it was not trained on.",
    )


def set_user_flags(flat: Mapping) -> list[str]:
    """Which of these flags are not at their defaults."""
    return flags.set_flags(add_user_flags, flat)
