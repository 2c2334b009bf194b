"""Our flags on the parsers of the host: how options become flags and back, and the flags that several doors share."""

import argparse
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import reduce
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PREF_GROUP_KEY, USER_KEY, PREFERENCE_KEY = "data.pref_group_key", "data.user_key", "data.preference_key"
METRICS_PATH = "logger.metrics_path"
DEVICE, PLUGIN, TRUST = "pgrpo.device", "pgrpo.plugin", "trust_remote_code"

# Old spelling -> the one name that the flag now has in all trainers.
OLD_SPELLINGS = {
    "--pgrpo.group_key": PREF_GROUP_KEY,
    "--robust.group_key": PREF_GROUP_KEY,
    "--pgrpo.user_key": USER_KEY,
    "--reward.user_key": USER_KEY,
    "--pgrpo.metrics_path": METRICS_PATH,
    "--robust.metrics_path": METRICS_PATH,
    "--reward.metrics_path": METRICS_PATH,
}
# Some trainers have these, and others have no use for them.
OF_SOME_TRAINERS = (PREF_GROUP_KEY, USER_KEY, PREFERENCE_KEY, METRICS_PATH)
# They are gone, because no experiment supported them.
GONE = ("--pgrpo.variance", "--robust.update", "--robust.smoothing", "--robust.adjustment", "--robust.floor")


# ---- options of a dataclass ----


def add_options(group, namespace: str, options: type, only: Collection[str] | None = None) -> None:
    """Adds a flag `--<namespace>.<field>` for each field of a dataclass, or for those named by `only`.

    Type and choices come from the type hint: int, float, str, bool, Literal, or one of these or None. A field made by
    `core.options.option` also has a help text.

    Raises:
        ValueError: a field without a default or of another type.
    """
    try:
        hints = get_type_hints(options)
    except NameError as error:
        raise ValueError(f"flags need type hints that can be read, got {error} in {options.__name__}") from error
    for spec in _fields(options, only):
        name = f"{options.__name__}.{spec.name}"
        if spec.default is MISSING:
            raise ValueError(f"a flag needs an option with a plain default, got none or a factory: {name}")
        kind, choices = _kind(hints[spec.name], name)
        text = spec.metadata.get("help", "").replace("%", "%%")
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": kind, "choices": spec.metadata.get("choices") or choices}
        group.add_argument(f"--{namespace}.{spec.name}", default=spec.default, help=text or None, **how)


def _fields(options: type, only: Collection[str] | None) -> list[Field]:
    """The fields that are options: those of __init__, or of them those named by `only`."""
    return [spec for spec in fields(options) if spec.init and (only is None or spec.name in only)]


def _kind(hint, name: str) -> tuple[type, tuple | None]:
    """The type of the values on a command line, and the choices if there are any."""
    if get_origin(hint) in (Union, UnionType):
        inner = [part for part in get_args(hint) if part is not NoneType]
        hint = inner[0] if len(inner) == 1 else hint
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if len({*map(type, choices)}) > 1:
            raise ValueError(f"a flag needs a Literal of one type, got {hint}: {name}")
        return type(choices[0]), choices
    if hint not in (int, float, str, bool):
        raise ValueError(f"a flag needs an option that is int, float, str, bool or Literal, got {hint}: {name}")
    return hint, None


def read_options(options: type, namespace: str, flat: Mapping[str, Any], only: Collection[str] | None = None):
    """The dataclass from a flat mapping of flags to values; fields that `only` leaves out keep their defaults.

    Raises:
        ValueError: the dataclass refuses a value; the message begins with the flag.
    """
    names = [spec.name for spec in _fields(options, only)]
    try:
        return options(**{name: flat[f"{namespace}.{name}"] for name in names})
    except ValueError as error:
        flag = str(error).split()[0] in names if str(error) else False
        raise ValueError(f"--{namespace}.{error}" if flag else f"options of {namespace}: {error}") from error


def flatten(args, prefix: str = "") -> dict[str, Any]:
    """Nested host arguments under their dotted names, as the host's parser has them."""
    found = {}
    for name, value in vars(args).items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, type(args)) else {prefix + name: value}
    return found


def nest(args: argparse.Namespace) -> SimpleNamespace:
    """Arguments as the host nests them: `args.data.max_len` of the flag `--data.max_len`.

    The host has the same in `openrlhf.utils.config`, behind imports of half a minute.
    """
    root = SimpleNamespace()
    for flag, value in vars(args).items():
        *sections, name = flag.split(".")
        place = root
        for section in sections:
            if not hasattr(place, section):
                setattr(place, section, SimpleNamespace())
            place = getattr(place, section)
        setattr(place, name, value)
    return root


def value(args, flag: str, *default) -> Any:
    """The value of a flag among nested arguments; of a script that has no such flag, the default."""
    try:
        return reduce(getattr, flag.split("."), args)
    except AttributeError:
        if not default:
            raise
        return default[0]


def set_flags(add: Callable[[argparse.ArgumentParser], None], flat: Mapping[str, Any]) -> list[str]:
    """Which flags, of those that `add` puts on a parser, do not have their default value."""
    defaults = argparse.ArgumentParser(allow_abbrev=False)
    add(defaults)
    return [name for name, default in vars(defaults.parse_args([])).items() if flat[name] != default]


# ---- flags of several doors ----


def refuse_idle(given: Collection[str], *rows: tuple[str, str, Any, bool]) -> None:
    """Refuses flags that do nothing beside the others.

    Args:
        given: those that have not their default value.
        rows: a flag, what it needs, what there is instead, and whether it does nothing then.
    """
    for name, need, got, idle in rows:
        if idle and name in given:
            raise ValueError(
                f"--{name} needs {need}, got {got}, with which it does nothing: change that, or leave --{name} out"
            )


def idle_at_chi(flat: Mapping[str, Any]) -> list[tuple[str, str, Any, bool]]:
    """What `refuse_idle` looks at for the weights of preference groups, in all trainers. A mu by name is never idle:
    it says which preference groups there are."""
    chi, shares = flat["robust.chi"], flat["robust.mu"] == "share"
    moving = ("robust.eta", "robust.sampling", "robust.weights")
    return [
        ("robust.mu", "--robust.chi below 1", chi, chi == 1 and shares),
        *((name, "--robust.chi above 0", chi, chi == 0) for name in moving),
    ]


def are_ours(args) -> bool:
    """Whether nested host arguments come from a parser that a door has extended: each door adds `--pgrpo.device`."""
    return hasattr(args, "pgrpo")


def in_our_runs(replacement: Callable) -> Callable:
    """`replacement`, a wrapper of wrapt, for objects of the host whose `args` are ours; others get what it wraps.

    Seams are in a process for all that happens there. The host's classes can also be used by code that came through no
    door, as the host's own tests do, and such arguments tell nothing of what is asked here.
    """

    def choose(wrapped, instance, args, kwargs):
        return replacement(wrapped, instance, args, kwargs) if are_ours(instance.args) else wrapped(*args, **kwargs)

    return choose


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


def add_trust(group) -> None:
    """Adds `--trust_remote_code`."""
    group.add_argument(
        f"--{TRUST}",
        action="store_true",
        help="Run Python code that comes with a model. Off by default, because such code can do on this machine and "
        "the cluster whatever you can: only for models of people whose programs you would run.",
    )


def early(argv: list[str]) -> Mapping[str, Any]:
    """The values of the flags that must be known before the host is imported: device, plugin, and whether code of
    models may run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_device(parser, "")
    add_plugin(parser)
    add_trust(parser)
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
    """Refuses old names of our flags, and abbreviations, which argparse would accept silently.

    Args:
        words: of the command line. ours: our flags. known: all flags of the parser.

    Raises:
        ValueError: names the flag to type instead.
    """
    for word in words:
        flag, _, value = word.partition("=")
        if "pgrpo_centered" in (flag, value) and "--advantage_estimator" in known:
            raise ValueError("pgrpo_centered is now --advantage_estimator pgrpo --pgrpo.center prompt: type that")
        if not flag.startswith("--") or flag == "--" or flag in known:
            continue
        if new := OLD_SPELLINGS.get(flag):
            raise ValueError(
                f"{flag} is now called --{new}, got the old name: type the new one"
                if f"--{new}" in known
                else f"{flag} is an old name of --{new}, which does nothing in this script: leave it out"
            )
        if flag.removeprefix("--") in OF_SOME_TRAINERS:
            raise ValueError(f"{flag} is for other trainers and does nothing in this script: leave it out")
        if flag in GONE:
            raise ValueError(f"{flag} is gone, because no experiment supported it: leave it out")
        if meant := sorted(name for name in ours if name.startswith(flag)):
            raise ValueError(f"{flag} needs its whole name, got an abbreviation of {', '.join(meant)}: type it out")
