"""A dataclass field that is also a flag: default, type, choices, and the sentences that `--help` shows."""

from dataclasses import field


def option(default, type, text, choices=None):
    return field(default=default, metadata={"type": type, "help": text, "choices": choices})
