"""Fields of an options class: default, type, choices, help text, and the check of their values."""

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any


def option(default: Any, type: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field of `type`. `text` explains it to users: what it does, its default and the reason for it."""
    return field(default=default, metadata={"type": type, "help": text, "choices": choices})


def check_options(options: Any, needs: dict[str, tuple[str, bool]]) -> None:
    """Checks the values of a dataclass, of which fields made by `option` may have choices.

    Args:
        needs: for a field, what it needs in words, and whether its value has it.

    Raises:
        ValueError: a value that is none of its choices, or that lacks what it needs. The message begins with the name
            of the field.
    """
    for spec in fields(options):
        choices = spec.metadata.get("choices")
        if choices:
            needs = {spec.name: (f"one of {', '.join(choices)}", getattr(options, spec.name) in choices), **needs}
    for name, (need, holds) in needs.items():
        if not holds:
            raise ValueError(f"{name} needs {need}, got {getattr(options, name)!r}")
