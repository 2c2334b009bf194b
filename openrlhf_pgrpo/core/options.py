"""A dataclass field that is also a flag: default, type, choices, and the sentences that `--help` shows."""

from dataclasses import Field, field
from typing import Iterable


def option(default, type, text, choices=None):
    return field(default=default, metadata={"type": type, "help": text, "choices": choices})


def add_flags(parser, prefix: str, specs: Iterable[Field]) -> None:
    """Adds a flag `--<prefix>.<name>` for each of `specs`, fields made by `option`, to an argparse parser or group."""
    for spec in specs:
        parser.add_argument(
            f"--{prefix}.{spec.name}",
            type=spec.metadata["type"],
            choices=spec.metadata["choices"],
            default=spec.default,
            help=spec.metadata["help"].replace("%", "%%"),
        )
