"""The flag of every command that loads a model."""

import argparse

from openrlhf_pgrpo.host.flags import add_trust

__all__ = ["add_trust", "heed_trust"]


def heed_trust(args: argparse.Namespace) -> None:
    """Lets code of models run in this process and its children, if the flag is given."""
    from openrlhf_pgrpo.models.remote_code import trust

    if args.trust_remote_code:
        trust()
