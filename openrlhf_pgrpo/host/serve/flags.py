"""Our flags on the parser of the host's reward server."""

import argparse

from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.host.user_flags import add_user_flags


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds `--reward.*` and the column of users to the host's parser."""
    group = parser.add_argument_group("factorized reward model (openrlhf_pgrpo)")
    flags.add_device(group, "Where the model runs.")
    flags.add_trust(group)
    add_user_flags(group)
    group.add_argument(
        f"--{flags.USER_KEY}",
        default="user",
        help="A label is the user, or an object that holds the user under this key. Default: user.",
    )
    add_texts(group)
    # So that the server can tell the host's length, which is for plain models, from one that was asked for.
    parser.set_defaults(**{"data.max_len": HostDefault(parser.get_default("data.max_len"))})
    parser.set_defaults(host="127.0.0.1")


def add_texts(group) -> None:
    """Adds `--reward.end`, how texts end, and `--max_texts`, `--max_characters` and `--max_body`, what a request may
    hold."""
    group.add_argument(
        "--reward.end",
        default=None,
        metavar="TEXT",
        help="What closes an answer of the policy, such as '<|im_end|>', if its tokenizer is another one. A model "
        "that was made with its chat template knows it.",
    )
    for flag, default, what in (
        ("max_texts", 1024, "Texts in a request"),
        ("max_characters", 1_000_000, "Characters of a text in a request"),
        ("max_body", 16 * 2**20, "Bytes of a request"),
    ):
        text = f"{what}; a server of a factorized model refuses more, status 413. Default: {default}"
        group.add_argument(f"--{flag}", type=positive, default=default, help=text)


class HostDefault(int):
    """A number that the host's parser gives to a flag that was left out."""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
