"""Our flags on the parser of the host's reward-model trainer, and what they refuse."""

import argparse
import math
from dataclasses import dataclass
from typing import Literal

from openrlhf_pgrpo.core.options import check_options, option
from openrlhf_pgrpo.host import flags

# Flags of the host that work for a single reward only: which values are refused, and what they need.
REFUSED = {
    "model.margin_loss_enable": (bool, "a margin on one reward"),
    "model.loss_type": (lambda name: name != "sigmoid", "the loss of one reward"),
    "ds.packing_samples": (bool, "texts without a row of their own"),
    "ds.tensor_parallel_size": (lambda size: size > 1, "a head in one piece"),
    "ds.load_in_4bit": (bool, "adapters that stay apart from the weights"),
    "optim": (lambda name: name != "adam", "a matrix for Muon, which a table of users is not"),
}


@dataclass(frozen=True)
class RewardOptions:
    """How a factorized reward model is trained; every field is a flag `--reward.<name>`.

    l2: if a user decides all pairs alike, their probability ends at about 1 - l2. There the pull of one more such
    pair, 1 - p, equals that of the penalty l2/2 (|f|^2 + |lambda|^2) along the logit f . lambda.

    Raises:
        ValueError: a value out of range.
    """

    factors: int | None = option(
        None,
        "D: train a reward model with this many base rewards, shared by all users, and D coefficients for each user. "
        "Without it the host trains its one reward as usual.",
    )
    pooling: Literal["last", "mean"] | None = option(
        None,
        "Which state of a text the base rewards see: that of its last token, or the mean of all. Default: as in a "
        "factorized --model.model_name_or_path, else last.",
    )
    l2: float = option(
        0.02,
        "Weight of the penalty on both factors, l2/2 (|phi_chosen - phi_rejected|^2 + |lambda|^2) of a pair. If only "
        "one factor were penalised, the other would grow. 0.02 (default): no pair is driven beyond about 98 %.",
    )
    coefficients_lr: float = option(
        1e-2,
        "Learning rate of the users' coefficients; --adam.lr is for everything else. They need their own rate because "
        "each user is in few steps. Default 0.01.",
    )

    def __post_init__(self):
        rate = self.coefficients_lr
        needs = {
            "factors": ("a number of base rewards >= 1", self.factors is None or self.factors >= 1),
            "l2": ("a finite number >= 0", math.isfinite(self.l2) and self.l2 >= 0),
            "coefficients_lr": ("a finite number > 0", math.isfinite(rate) and rate > 0),
        }
        check_options(self, needs)


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds `--reward.*` and the flags of all trainers to the host's parser."""
    group = parser.add_argument_group("factorized reward model (openrlhf_pgrpo)")
    flags.add_device(group, "Where training runs.")
    flags.add_trust(group)
    _add_reward_flags(group)


def _add_reward_flags(group) -> None:
    flags.add_options(group, "reward", RewardOptions)
    group.add_argument(f"--{flags.USER_KEY}", default=None, help="Dataset column that names the user of a pair.")
    group.add_argument(
        f"--{flags.PREFERENCE_KEY}",
        default=None,
        help="Dataset column with the preference for the chosen response, from 0 to 1; 0.5 is a tie. Default: the "
        "column preference, if there is one, as openrlhf-pgrpo factorize reads it; else chosen is preferred.",
    )
    flags.add_metrics_path(group)


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser.

    Raises:
        ValueError: the message says what is needed, what was given and what to do.
    """
    flat = vars(args)
    options = flags.read_options(RewardOptions, "reward", flat)
    if options.factors is None:
        if given := flags.set_flags(_add_reward_flags, flat):
            raise ValueError(
                f"--{', --'.join(given)} needs --reward.factors, got none: say how many base rewards to train"
            )
        if flat["ds.lora.rank"] > 0:
            raise ValueError(
                f"--ds.lora.rank {flat['ds.lora.rank']} needs --reward.factors, got none: leave it out, because the "
                "host saves adapters without the head that they were trained with, and whoever loads them draws "
                "another"
            )
        if flat["model.margin_loss_enable"] and flat["model.loss_type"] != "sigmoid":
            raise ValueError(
                f"--model.margin_loss_enable needs --model.loss_type sigmoid, got {flat['model.loss_type']}, which "
                "reads no margin: leave one of them out"
            )
        return
    if flat[flags.USER_KEY] is None:
        raise ValueError(f"--reward.factors needs --{flags.USER_KEY}, got none: name the dataset column of users")
    for name, (refused, need) in REFUSED.items():
        if refused(flat[name]):
            raise ValueError(f"--{name} {flat[name]} needs {need}, got --reward.factors: leave one of them out")


def settings(args, pooling: str) -> dict:
    """Everything that gives head and table their meaning, for the check at resume."""
    return {
        "reward.factors": args.reward.factors,
        "reward.pooling": pooling,
        "reward.l2": args.reward.l2,
        flags.USER_KEY: args.data.user_key,
        flags.PREFERENCE_KEY: args.data.preference_key,
    }
