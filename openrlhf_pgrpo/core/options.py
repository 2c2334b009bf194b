"""Fields of an options class: default, type, choices, help text, and the check of their values."""

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field whose type is its type hint. `text` tells users what it does, its default and the reason."""
    return field(default=default, metadata={"help": text, "choices": choices})


def check_options(options: Any, needs: dict[str, tuple[str, bool]]) -> None:
    """Checks the values of a dataclass. Fields made by `option` may have choices.

    Args:
        needs: field -> what it needs, in words, and whether its value is right.

    Raises:
        ValueError: a value that is none of the choices, or not what the field needs. The message begins with the name
            of the field.
    """
    for spec in fields(options):
        choices = spec.metadata.get("choices")
        if choices:
            needs = {spec.name: (f"one of {', '.join(choices)}", getattr(options, spec.name) in choices), **needs}
    for name, (need, holds) in needs.items():
        if not holds:
            raise ValueError(f"{name} needs {need}, got {getattr(options, name)!r}")
