"""What the commands do about --trust_remote_code; `host.flags.add_trust` adds it to their parsers."""

import argparse

from openrlhf_pgrpo.models.remote_code import trust


def heed_trust(args: argparse.Namespace) -> None:
    """Lets code of models run in this process and its children, if the flag is given."""
    if args.trust_remote_code:
        trust()
