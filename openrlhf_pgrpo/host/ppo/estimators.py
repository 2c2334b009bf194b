"""From the host's nested arguments to the estimator, the weights and the user rewards of a run. It runs in the
trainer actor; the driver reads names from it.

`--advantage_estimator group_robust` is no estimator: it weighs the advantages of another one, its base.
"""

from collections.abc import Sequence

from openrlhf_pgrpo.core.estimator import (
    AdvantageEstimator,
    advantage_estimators,
    load_plugin,
    make_advantage_estimator,
    namespace_of,
    options_of,
)
from openrlhf_pgrpo.core.group_robust import GroupRobust, check_names
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.core.signals import SIGNALS, SignalOptions
from openrlhf_pgrpo.host import flags, plan
from openrlhf_pgrpo.host.ppo import reward_model

# Value of `--advantage_estimator` -> the estimator whose advantages are weighted, unless --robust.base names another.
ROBUST_ESTIMATORS = {"group_robust": "group_norm", "pgrpo_robust": "pgrpo"}


def estimator_name(args) -> str:
    """The given value of `--advantage_estimator`. The host sees only its base."""
    return args.robust.estimator or args.algo.advantage.estimator


def make_estimator(args) -> AdvantageEstimator | None:
    """The estimator that the arguments name; None if it is one of the host's own."""
    if args.pgrpo.plugin is not None:
        load_plugin(args.pgrpo.plugin)
    name = args.algo.advantage.estimator
    return make_advantage_estimator(name, _options(name, args)) if name in advantage_estimators() else None


def _options(name: str, args):
    """The options of a registered estimator; None if it has none."""
    options = options_of(name)
    namespace = namespace_of(options)
    return None if namespace is None else flags.read_options(options, namespace, flags.flatten(args))


def make_robust(args) -> GroupRobust | None:
    """The weights of preference groups; None unless a robust estimator was asked for."""
    if args.robust.estimator is None:
        return None
    robust, signal = _robust_options(args)
    return GroupRobust(robust, SIGNALS[signal.signal](signal))


def loss_counts_tokens(args) -> bool:
    """Whether the host's policy loss is a mean over the tokens of a batch, and not over its samples. Hosts before
    0.11.2 have no flag for it; with GSPO it never is."""
    mode = getattr(args.actor, "loss_agg_mode", "token-mean")
    return mode == "token-mean" and args.actor.policy_loss_type != "gspo"


def _robust_options(args) -> tuple[RobustOptions, SignalOptions]:
    flat = flags.flatten(args)
    robust, signal = (flags.read_options(options, "robust", flat) for options in (RobustOptions, SignalOptions))
    return robust, signal


def make_user_rewards(args):
    """The `UserRewards` that turn base rewards of a local model into rewards; None for any other source of rewards.

    Raises:
        ValueError: as `UserRewards` and `reward_model.check_texts`. It runs where the models are.
    """
    from openrlhf_pgrpo.host.user_rewards import UserRewards, factorized_folder  # transformers

    if not plan.rewards_are_local(args):
        return None
    reward_model.check_texts(args)
    folder = factorized_folder(args.reward.model_name_or_path, args.reward.chat_template)
    return None if folder is None else UserRewards(folder, args.reward)


def check_pref_groups(args, names: Sequence[str]) -> None:
    """Refuses preference groups of the data that the options of a robust estimator leave out, and a single one."""
    if args.robust.estimator is not None:
        if len(names) < 2:
            raise ValueError(
                f"{args.robust.estimator} needs at least two preference groups in --{flags.PREF_GROUP_KEY} "
                f"{args.data.pref_group_key}, got {listed(names)}: name another column, or take an estimator without "
                "weights"
            )
        try:
            check_names(names, *_robust_options(args))
        except ValueError as error:
            raise ValueError(f"--robust.{error}") from error


def settings(args) -> dict:
    """Everything that gives a reward history, and weights, their meaning, for the check at resume."""
    name = args.algo.advantage.estimator
    found = {"advantage_estimator": estimator_name(args), flags.PREF_GROUP_KEY: args.data.pref_group_key}
    if name in advantage_estimators() and (options := _options(name, args)) is not None:
        namespace = namespace_of(type(options))
        found |= {f"{namespace}.{option}": value for option, value in vars(options).items()}
    if args.robust.estimator is not None:
        found["robust.base"] = name
        for options in _robust_options(args):
            found |= {f"robust.{option}": value for option, value in vars(options).items()}
    return found
