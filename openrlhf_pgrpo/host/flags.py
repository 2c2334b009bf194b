"""Our flags on the parsers of the host: how options become flags and back, and those that several doors have."""

import argparse
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PREF_GROUP_KEY, USER_KEY, PREFERENCE_KEY = "data.pref_group_key", "data.user_key", "data.preference_key"
METRICS_PATH = "logger.metrics_path"
DEVICE, PLUGIN = "pgrpo.device", "pgrpo.plugin"

# What a flag was called before it had one name in all trainers.
OLD_SPELLINGS = {
    "--pgrpo.group_key": PREF_GROUP_KEY,
    "--robust.group_key": PREF_GROUP_KEY,
    "--pgrpo.user_key": USER_KEY,
    "--reward.user_key": USER_KEY,
    "--pgrpo.metrics_path": METRICS_PATH,
    "--robust.metrics_path": METRICS_PATH,
    "--reward.metrics_path": METRICS_PATH,
}


# ---- options of a dataclass ----


def add_options(group, namespace: str, options: type, only: Collection[str] | None = None) -> None:
    """Adds a flag `--<namespace>.<field>` for each field of a dataclass, or for those named by `only`.

    Type and choices come from the type hint: int, float, str, bool, Literal, or one of these or None. A field made by
    `core.options.option` also has a help text.

    Raises:
        ValueError: a field without a default or of another type.
    """
    hints = get_type_hints(options)
    for spec in fields(options):
        if only is not None and spec.name not in only:
            continue
        name = f"{options.__name__}.{spec.name}"
        if spec.default is MISSING:
            raise ValueError(f"a flag needs an option with a default, got none for {name}: give it one")
        kind, choices = _kind(hints[spec.name], name)
        text = spec.metadata.get("help", "").replace("%", "%%")
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": kind, "choices": spec.metadata.get("choices") or choices}
        group.add_argument(f"--{namespace}.{spec.name}", default=spec.default, help=text or None, **how)


def _kind(hint, name: str) -> tuple[type, tuple | None]:
    """The type that a command line is read as, and the choices if there are."""
    if get_origin(hint) in (Union, UnionType):
        inner = [part for part in get_args(hint) if part is not NoneType]
        hint = inner[0] if len(inner) == 1 else hint
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return type(choices[0]), choices
    if hint not in (int, float, str, bool):
        raise ValueError(f"a flag needs an option that is int, float, str, bool or Literal, got {hint}: {name}")
    return hint, None


def read_options(options: type, namespace: str, flat: Mapping[str, Any], only: Collection[str] | None = None):
    """The dataclass from a flat mapping of flags to values; fields that `only` leaves out keep their defaults.

    Raises:
        ValueError: the dataclass refuses a value; the message begins with the flag.
    """
    names = [spec.name for spec in fields(options) if only is None or spec.name in only]
    try:
        return options(**{name: flat[f"{namespace}.{name}"] for name in names})
    except ValueError as error:
        raise ValueError(f"--{namespace}.{error}") from error


def flatten(args, prefix: str = "") -> dict[str, Any]:
    """Nested host arguments under their dotted names, as the host's parser has them."""
    found = {}
    for name, value in vars(args).items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, type(args)) else {prefix + name: value}
    return found


def set_flags(add: Callable[[argparse.ArgumentParser], None], flat: Mapping[str, Any]) -> list[str]:
    """Those of the flags that `add` puts on a parser whose value is not the default."""
    defaults = argparse.ArgumentParser(allow_abbrev=False)
    add(defaults)
    return [name for name, default in vars(defaults.parse_args([])).items() if flat[name] != default]


# ---- flags of several doors ----


def add_device(group, where: str, cluster: str = "") -> None:
    """Adds `--pgrpo.device`; `where` says what runs on it."""
    group.add_argument(
        f"--{DEVICE}",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help=f"{where} auto (default): cpu if this machine has no CUDA device{cluster}, else gpu.",
    )


def add_plugin(group) -> None:
    """Adds `--pgrpo.plugin`."""
    group.add_argument(
        f"--{PLUGIN}",
        default=None,
        help="A .py file or dotted module with estimators of your own (@register_advantage_estimator); every node "
        "must be able to read it.",
    )


def early(argv: list[str]) -> Mapping[str, Any]:
    """The values of the flags that must be known before the host is imported: the device and the plugin."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_device(parser, "")
    add_plugin(parser)
    return vars(parser.parse_known_args(argv)[0])


def add_metrics_path(group) -> None:
    """Adds `--logger.metrics_path`."""
    group.add_argument(
        f"--{METRICS_PATH}",
        default=None,
        help="JSONL file with the metrics of each step. Default: metrics.jsonl in --ckpt.output_dir.",
    )


def metrics_path(args) -> str:
    """Where the metrics of each step go; nested host arguments."""
    return args.logger.metrics_path or os.path.join(args.ckpt.output_dir, "metrics.jsonl")


# ---- spellings ----


def refuse_other_spellings(words: Iterable[str], ours: Collection[str], known: Collection[str]) -> None:
    """Refuses old names of our flags, and abbreviations, which argparse would take without a word.

    Args:
        words: of the command line. ours: our flags. known: all flags of the parser.

    Raises:
        ValueError: names the flag to type instead.
    """
    for word in words:
        flag = word.split("=")[0]
        if not flag.startswith("--") or flag == "--" or flag in known:
            continue
        if flag in OLD_SPELLINGS:
            raise ValueError(f"{flag} is now called --{OLD_SPELLINGS[flag]}, got the old name: type the new one")
        if meant := sorted(name for name in ours if name.startswith(flag)):
            raise ValueError(f"{flag} needs its whole name, got an abbreviation of {', '.join(meant)}: type it out")
