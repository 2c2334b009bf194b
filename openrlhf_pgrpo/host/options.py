"""Our flags on the host's parser, and what they refuse."""

import argparse
import os
from dataclasses import fields
from typing import Sequence

from openrlhf_pgrpo.core import advantages  # noqa: F401  registers the built-in estimators
from openrlhf_pgrpo.core.advantages import PGRPOOptions
from openrlhf_pgrpo.core.group_robust import ROBUST_ESTIMATORS, SIGNALS, GroupRobust, SignalOptions, check_names
from openrlhf_pgrpo.core.options import add_flags
from openrlhf_pgrpo.core.registry import (
    AdvantageEstimator,
    advantage_estimators,
    load_plugin,
    make_advantage_estimator,
)
from openrlhf_pgrpo.core.robust import RobustOptions
from openrlhf_pgrpo.host import reward_options

ESTIMATOR = "algo.advantage.estimator"
ROBUST = "robust.estimator"  # no flag: where the name of a robust estimator goes when its base takes its place


def early(argv: list[str]) -> argparse.Namespace:
    """The flags that must be known before the host is imported: `pgrpo.device` and `pgrpo.plugin`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_early_flags(parser)
    return parser.parse_known_args(argv)[0]


def _add_early_flags(parser) -> None:
    parser.add_argument(
        "--pgrpo.device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="Where the whole stack runs. auto (default): cpu if this machine has no CUDA device and RAY_ADDRESS "
        "names no cluster, else gpu.",
    )
    parser.add_argument(
        "--pgrpo.plugin",
        default=None,
        help="A .py file or dotted module with estimators of your own (@register_advantage_estimator); every node "
        "must be able to read it.",
    )


def _add_flags(parser) -> None:
    group = parser.add_argument_group("preference groups (openrlhf_pgrpo)")
    _add_early_flags(group)
    group.add_argument(
        "--pgrpo.group_key",
        default=None,
        help="Dataset column, or key of a struct label, that names the preference group of a prompt. With an "
        "estimator of the host it only adds logging per preference group.",
    )
    group.add_argument(
        "--pgrpo.user_key", default=None, help="Dataset column, or key of a struct label, that names the user."
    )
    add_flags(group, "pgrpo", fields(PGRPOOptions))
    group.add_argument(
        "--pgrpo.fresh_history",
        action="store_true",
        help="Resume model and optimizer but start with an empty reward history and, if robust, equal weights.",
    )
    group.add_argument(
        "--pgrpo.metrics_path",
        default=None,
        help="JSONL file with the metrics of each step. Default: metrics.jsonl in --ckpt.output_dir.",
    )


def _add_robust_flags(parser, bases: list[str]) -> None:
    group = parser.add_argument_group("group-robust training (openrlhf_pgrpo)")
    defaults = ", ".join(f"{base} for {name}" for name, base in ROBUST_ESTIMATORS.items())
    group.add_argument(
        "--robust.base",
        choices=bases,
        default=None,
        help=f"The estimator whose final advantages are weighted by preference group. Default: {defaults}.",
    )
    add_flags(group, "robust", _robust_fields())
    parser.set_defaults(**{ROBUST: None})


def _robust_fields():
    return [*fields(RobustOptions), *fields(SignalOptions)]


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds our flags, and the names of registered estimators, to a host parser."""
    action = parser._option_string_actions[f"--{ESTIMATOR}"]
    taken = sorted({*action.choices, *ROBUST_ESTIMATORS} & set(advantage_estimators()))
    if taken:
        raise ValueError(f"a registered estimator needs a name that is not in use, got {', '.join(taken)}")
    bases = [*action.choices, *advantage_estimators()]
    action.choices = [*bases, *ROBUST_ESTIMATORS]
    action.help += " Of openrlhf_pgrpo: " + ", ".join([*advantage_estimators(), *ROBUST_ESTIMATORS]) + "."
    parser.add_argument(
        "--advantage_estimator",
        dest=ESTIMATOR,
        choices=action.choices,
        default=argparse.SUPPRESS,
        help=f"Short for --{ESTIMATOR}.",
    )
    _add_flags(parser)
    _add_robust_flags(parser, bases)
    reward_options.add_user_flags(parser.add_argument_group("factorized reward model (openrlhf_pgrpo)"))


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser; makes paths absolute.

    The base of a robust estimator takes its place, so that critic, samples per prompt, discount and whitening are
    those of the base, by the host's own code.

    Raises:
        ValueError: what was needed, what came, what to do.
    """
    flat = vars(args)
    _check_robust(flat)
    name = flat[ESTIMATOR]
    chosen = PGRPOOptions(**{spec.name: flat[f"pgrpo.{spec.name}"] for spec in fields(PGRPOOptions)})
    if name in advantage_estimators():
        estimator = make_advantage_estimator(name, chosen)
        if estimator.uses_pref_groups and flat["pgrpo.group_key"] is None:
            raise ValueError(f"{name} needs --pgrpo.group_key, got none: name the dataset column of preference groups")
        n, needed = flat["rollout.n_samples_per_prompt"], estimator.min_samples_per_prompt
        if n < needed:
            raise ValueError(
                f"{name} with --pgrpo.center {estimator.options.center} needs --rollout.n_samples_per_prompt >= "
                f"{needed}, got {n}: raise it or centre on the history"
            )
    if flat["pgrpo.user_key"] is not None and flat["pgrpo.group_key"] is None:
        raise ValueError("--pgrpo.user_key needs --pgrpo.group_key, got none: name the column of groups too")
    _check_reward_model(flat)
    plugin = flat["pgrpo.plugin"]
    if plugin is not None and plugin.endswith(".py"):
        flat["pgrpo.plugin"] = os.path.abspath(plugin)


def _check_robust(flat: dict) -> None:
    name = flat[ESTIMATOR]
    if name not in ROBUST_ESTIMATORS:
        set_flags = {f"--robust.{spec.name}": flat[f"robust.{spec.name}"] != spec.default for spec in _robust_fields()}
        given = [flag for flag, is_set in {"--robust.base": flat["robust.base"], **set_flags}.items() if is_set]
        if given:
            raise ValueError(
                f"{', '.join(given)} needs --advantage_estimator {' or '.join(ROBUST_ESTIMATORS)}, got {name}: "
                "choose one of them or leave the flags out"
            )
        return
    if flat["pgrpo.group_key"] is None:
        raise ValueError(f"{name} needs --pgrpo.group_key, got none: name the dataset column of preference groups")
    for chosen in (RobustOptions, SignalOptions):
        chosen(**{spec.name: flat[f"robust.{spec.name}"] for spec in fields(chosen)})
    flat[ROBUST], flat[ESTIMATOR] = name, flat["robust.base"] or ROBUST_ESTIMATORS[name]


def _check_reward_model(flat: dict) -> None:
    from openrlhf_pgrpo.host.user_rewards import factorized_folder  # transformers: not before the host is ready for it

    defaults = {"--reward.unknown_user": reward_options.ERROR, "--reward.profiles": None}
    given = [flag for flag, default in defaults.items() if flat[flag[2:]] != default]
    local = not (flat["reward.remote_url"] or flat["train.agent_func_path"])
    folder = factorized_folder(flat["reward.model_name_or_path"]) if local else None
    if folder is None:
        if given:
            raise ValueError(
                f"{', '.join(given)} needs a factorized reward model in --reward.model_name_or_path, got none: name "
                "one, or give the flags to the server that has it"
            )
        return
    if flat["pgrpo.user_key"] is None and flat["reward.unknown_user"] == reward_options.ERROR:
        raise ValueError(
            f"the reward model {folder.name} needs --pgrpo.user_key, got none: name the dataset column of users, or "
            f"pass --reward.unknown_user {reward_options.MEAN} for the average user"
        )
    if flat[ESTIMATOR] == "gae" and flat["critic.model_name_or_path"] is None:
        raise ValueError(
            f"a critic cannot start from the base rewards of {folder.name}: name another model with "
            "--critic.model_name_or_path, or use an estimator without critic"
        )


def make_user_rewards(args):
    """The `UserRewards` that make rewards of a local model's base rewards; None for any other source of rewards."""
    from openrlhf_pgrpo.host.user_rewards import UserRewards, factorized_folder

    if args.reward.remote_url or args.train.agent_func_path:
        return None
    folder = factorized_folder(args.reward.model_name_or_path)
    return None if folder is None else UserRewards(folder, args.reward)


def check_pref_groups(args, names: Sequence[str]) -> None:
    """Refuses preference groups of the data that a robust estimator was told nothing of; nested host arguments."""
    if args.robust.estimator is not None:
        check_names(names, *_robust_options(args))


def make_estimator(args) -> AdvantageEstimator | None:
    """The estimator that the nested host arguments name; None if it is one of the host's own."""
    if args.pgrpo.plugin is not None:
        load_plugin(args.pgrpo.plugin)
    if args.algo.advantage.estimator not in advantage_estimators():
        return None
    return make_advantage_estimator(args.algo.advantage.estimator, _options(args))


def make_robust(args) -> GroupRobust | None:
    """What weights the advantages by preference group; None unless a robust estimator was asked for."""
    if args.robust.estimator is None:
        return None
    robust, signal = _robust_options(args)
    return GroupRobust(robust, SIGNALS[signal.signal](signal))


def _robust_options(args) -> tuple[RobustOptions, SignalOptions]:
    return tuple(
        chosen(**{spec.name: getattr(args.robust, spec.name) for spec in fields(chosen)})
        for chosen in (RobustOptions, SignalOptions)
    )


def estimator_name(args) -> str:
    """What `--advantage_estimator` said, of which the host sees the base only."""
    return args.robust.estimator or args.algo.advantage.estimator


def _options(args) -> PGRPOOptions:
    return PGRPOOptions(**{spec.name: getattr(args.pgrpo, spec.name) for spec in fields(PGRPOOptions)})


def settings(args) -> dict:
    """Everything that gives a reward history, and weights, their meaning, for the check at resume."""
    robust = {}
    if args.robust.estimator is not None:
        robust["robust.base"] = args.algo.advantage.estimator
        for chosen in _robust_options(args):
            robust |= {f"robust.{name}": value for name, value in vars(chosen).items()}
    return {
        "advantage_estimator": estimator_name(args),
        "group_key": args.pgrpo.group_key,
        **vars(_options(args)),
        **robust,
    }


def metrics_path(args) -> str:
    return args.pgrpo.metrics_path or os.path.join(args.ckpt.output_dir, "metrics.jsonl")
