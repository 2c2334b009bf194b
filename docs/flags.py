"""Writes flags.md: every flag of ours, by door and by command, as the parsers have it.

    python docs/flags.py [FILE]

`make flags` runs it, and a test says so when flags.md is out of date.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

HEAD = """# All flags

Made from the parsers by `make flags`; do not edit. Every other flag of a training script is the host's own:
`python -m openrlhf_pgrpo.cli.train_ppo_ray --help` shows both.
"""


def page() -> str:
    """The page."""
    from openrlhf_pgrpo.cli.main import command_line
    from openrlhf_pgrpo.host import doors
    from openrlhf_pgrpo.host.script import host_parser

    parts = [HEAD]
    for name, title in (("PPO", "PPO"), ("DPO", "DPO and IPO"), ("RM", "Reward models"), ("SERVE", "Reward server")):
        door = getattr(doors, name)
        parser = host_parser(door.script)
        of_host = {*parser._actions}
        door.extend(parser)
        module = door.script.replace("openrlhf.", "openrlhf_pgrpo.")
        added = [action for action in parser._actions if action not in of_host]
        parts.append(f"## {title}\n\n`python -m {module}`\n\n{table(added)}")
    commands = next(action for action in command_line()._actions if action.dest == "command")
    for name, parser in commands.choices.items():
        (about,) = (choice.help for choice in commands._choices_actions if choice.dest == name)
        flags = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        parts.append(f"## `openrlhf-pgrpo {name}`\n\n{sentence(about)}\n\n{table(flags)}")
    return "\n".join(parts)


def table(actions: Iterable[argparse.Action]) -> str:
    rows = ["| flag | default | |", "|---|---|---|"]
    for action in actions:
        name = action.option_strings[0] if action.option_strings else action.metavar or action.dest
        choices = f"One of {', '.join(f'`{choice}`' for choice in action.choices)}. " if action.choices else ""
        text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{name}` | {default(action)} | {choices}{sentence(text)} |")
    return "\n".join(rows) + "\n"


def default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default in (None, argparse.SUPPRESS, []):
        return "none"
    if action.default is False:
        return "off"
    return f"`{action.default}`".replace("e-0", "e-")


def sentence(text: str) -> str:
    """With a capital and a full stop, which not every help text has."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


if __name__ == "__main__":
    path = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".md")
    path.write_text(page())
