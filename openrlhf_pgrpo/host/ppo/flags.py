"""Our flags on the parser of the host's PPO script, and what they refuse."""

import argparse
import os
from functools import partial

from openrlhf_pgrpo.core.estimator import (
    AdvantageEstimator,
    advantage_estimators,
    make_advantage_estimator,
    namespace_of,
    option_classes,
    options_of,
)
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.signals import SignalOptions
from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.host.ppo import reward_model
from openrlhf_pgrpo.host.ppo.estimators import ROBUST_ESTIMATORS
from openrlhf_pgrpo.host.user_flags import add_user_flags

ESTIMATOR = "algo.advantage.estimator"
ROBUST = "robust.estimator"  # not a flag: keeps the name of a robust estimator after its base replaced it
# Options of `SignalOptions`, and the signals that use them; bounds remember no rewards.
USED_BY = {
    "reference_samples": ("excess",),
    "improvement_lambda": ("improvement",),
    "outliers": ("quantiles", "excess", "improvement"),
}


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds our flags, and the names of registered estimators, to the host's parser.

    Raises:
        ValueError: an estimator has a name that is in use, or options that cannot be flags.
    """
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
    _add_pref_group_flags(parser.add_argument_group("preference groups (openrlhf_pgrpo)"))
    _add_robust_flags(parser, bases)
    for namespace in option_classes():
        if any(name.startswith(f"--{namespace}.") for name in parser._option_string_actions) and namespace != "pgrpo":
            raise ValueError(f"an estimator with options needs a name that begins no flag, got {namespace}: rename it")
        _add_estimator_options(parser, namespace)
    add_user_flags(parser.add_argument_group("factorized reward model (openrlhf_pgrpo)"))


def _add_pref_group_flags(group) -> None:
    group.add_argument(
        f"--{flags.PREF_GROUP_KEY}",
        default=None,
        help="Dataset column, or key of a struct label, that names the preference group of a prompt. With an "
        "estimator of the host it only adds logging per preference group.",
    )
    group.add_argument(
        f"--{flags.USER_KEY}", default=None, help="Dataset column, or key of a struct label, that names the user."
    )
    group.add_argument(
        "--pgrpo.fresh_history",
        action="store_true",
        help="Resume model and optimizer but start with an empty reward history and, if robust, equal weights.",
    )
    flags.add_device(group, "Where the whole stack runs.", " and RAY_ADDRESS names no cluster")
    flags.add_trust(group)
    flags.add_plugin(group)
    flags.add_metrics_path(group)


def _add_robust_flags(parser, bases: list[str]) -> None:
    group = parser.add_argument_group("group-robust training (openrlhf_pgrpo)")
    defaults = ", ".join(f"{base} for {name}" for name, base in ROBUST_ESTIMATORS.items())
    group.add_argument(
        "--robust.base",
        choices=bases,
        default=None,
        help=f"The estimator whose final advantages are weighted by preference group. Default: {defaults}.",
    )
    for options in (RobustOptions, SignalOptions):
        flags.add_options(group, "robust", options)
    parser.set_defaults(**{ROBUST: None})


def _add_estimator_options(parser, namespace: str) -> None:
    group = parser.add_argument_group(f"options of the estimator {namespace} (openrlhf_pgrpo)")
    flags.add_options(group, namespace, option_classes()[namespace])


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser; makes paths absolute.

    The base replaces a robust estimator in the arguments. So the host's own code chooses critic, samples per prompt,
    discount and whitening as for the base.

    Raises:
        ValueError: the message says what is needed, what was given and what to do.
    """
    flat = vars(args)
    _check_robust(flat)
    _check_estimator(flat)
    reward_model.check(flat)
    plugin = flat[flags.PLUGIN]
    if plugin is not None and plugin.endswith(".py"):
        flat[flags.PLUGIN] = os.path.abspath(os.path.expanduser(plugin))


def _check_robust(flat: dict) -> None:
    name, found = flat[ESTIMATOR], flags.set_flags(lambda parser: _add_robust_flags(parser, []), flat)
    given = [flag for flag in found if flag != ROBUST]
    if name not in ROBUST_ESTIMATORS:
        if given:
            raise ValueError(
                f"--{', --'.join(given)} needs --advantage_estimator {' or '.join(ROBUST_ESTIMATORS)}, got {name}: "
                "choose one of them or leave the flags out"
            )
        return
    _need_pref_groups(name, flat)
    flags.read_options(RobustOptions, "robust", flat)
    signal = flags.read_options(SignalOptions, "robust", flat).signal
    of_signals = (
        (f"robust.{option}", f"--robust.signal {' or '.join(owners)}", signal, signal not in owners)
        for option, owners in USED_BY.items()
    )
    flags.refuse_idle(given, *flags.idle_at_chi(flat), *of_signals)
    flat[ROBUST], flat[ESTIMATOR] = name, flat["robust.base"] or ROBUST_ESTIMATORS[name]


def _check_estimator(flat: dict) -> None:
    name, estimator = flat[ESTIMATOR], None
    chosen = {space: flags.read_options(options, space, flat) for space, options in option_classes().items()}
    namespace = namespace_of(options_of(name)) if name in advantage_estimators() else None
    _refuse_options_of_others(name, namespace, flat)
    if name in advantage_estimators():
        estimator = make_advantage_estimator(name, chosen.get(namespace))
        if estimator.uses_pref_groups:
            _need_pref_groups(name, flat)
        n, needed = flat["rollout.n_samples_per_prompt"], estimator.min_samples_per_prompt
        if n < needed:
            raise ValueError(
                f"{name} with these options needs --rollout.n_samples_per_prompt >= {needed}, got {n}: raise it, or "
                "take a baseline that needs fewer samples of a prompt"
            )
    _check_fresh_history(estimator, flat)


def _refuse_options_of_others(name: str, own: str | None, flat: dict) -> None:
    """Refuses options of estimators other than `name`, whose options have the namespace `own`."""
    for namespace in option_classes().keys() - {own}:
        if given := flags.set_flags(partial(_add_estimator_options, namespace=namespace), flat):
            takers = [known for known in advantage_estimators() if namespace_of(options_of(known)) == namespace]
            raise ValueError(
                f"--{', --'.join(given)} needs --advantage_estimator {' or '.join(takers)}, got {name}: choose one of "
                "them or leave the flags out"
            )


def _check_fresh_history(estimator: AdvantageEstimator | None, flat: dict) -> None:
    if not flat["pgrpo.fresh_history"]:
        return
    if not flat["ckpt.load_enable"]:
        raise ValueError(
            "--pgrpo.fresh_history needs --ckpt.load_enable, got a new run, whose history is empty: leave it out"
        )
    remembers = estimator is not None and type(estimator).state_dict is not AdvantageEstimator.state_dict
    if not remembers and flat[ROBUST] is None:
        raise ValueError(
            f"--pgrpo.fresh_history needs an estimator that remembers rewards, got {flat[ESTIMATOR]}: leave it out"
        )


def _need_pref_groups(name: str, flat: dict) -> None:
    if flat[flags.PREF_GROUP_KEY] is None:
        raise ValueError(
            f"{name} needs --{flags.PREF_GROUP_KEY}, got none: name the dataset column of preference groups"
        )
