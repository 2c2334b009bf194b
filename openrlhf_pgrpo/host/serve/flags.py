"""Our flags on the parser of the host's reward server."""

import argparse

from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.host.user_flags import add_user_flags


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds `--reward.*` and the column of users to the host's parser."""
    group = parser.add_argument_group("factorized reward model (openrlhf_pgrpo)")
    flags.add_device(group, "Where the model runs.")
    add_user_flags(group)
    group.add_argument(
        f"--{flags.USER_KEY}",
        default="user",
        help="A label is the user, or an object that holds the user under this key. Default: user.",
    )
