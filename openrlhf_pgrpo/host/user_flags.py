"""The flags about users in PPO and in the reward server: which users a factorized model serves, and how."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.models.users import ERROR, MEAN, Users

CHAT_TEMPLATE = "reward.chat_template"
NO_TEMPLATE = "plain"  # as models.form has it, which flags do not import

if TYPE_CHECKING:  # importing it takes seconds, and flags import this file
    from openrlhf_pgrpo.models.folder import Folder


def add_user_flags(group) -> None:
    """Adds `--reward.unknown_user`, `--reward.profiles` and `--reward.chat_template`."""
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
    group.add_argument(
        f"--{CHAT_TEMPLATE}",
        default=None,
        help="With a factorized reward model that was written before models recorded how their texts are written: the "
        f"folder of the model whose chat template it was, or {NO_TEMPLATE}.",
    )


def set_user_flags(flat: Mapping) -> list[str]:
    """Which of these flags are not at their defaults."""
    return flags.set_flags(add_user_flags, flat)


def check_profiles(folder: "Folder", profiles: str | None) -> None:
    """Refuses, before anything heavy starts, profiles that do not fit the factorized model in `folder`.

    Raises:
        ValueError: there are none, or one is broken, for another model, or of a user whom the model knows.
        OSError: a profile cannot be read.
    """
    if profiles is None:
        return
    try:
        Users(folder, [Path(profiles)])
    except ValueError as error:
        raise ValueError(f"--reward.profiles: {error}") from error
