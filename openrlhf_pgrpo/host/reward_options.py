"""Our flags on the host's script that trains reward models, what they refuse, and what must be known before it starts.

The host builds the model before it reads the data, and the table of users is as large as the data says: so the column
of users is read first, here.
"""

import argparse
import math
import os
from dataclasses import dataclass, fields

from openrlhf_pgrpo.core.options import add_flags, option

FLAG, SERVER_FLAG = "model.margin_loss_enable", "reward.model_name_or_path"
ERROR, MEAN = "error", "mean"
# What of the host's own works on a single reward only.
REFUSED = {
    "model.margin_loss_enable": (bool, "a margin on one reward"),
    "model.loss_type": (lambda name: name != "sigmoid", "the loss of one reward"),
    "ds.packing_samples": (bool, "texts without a row of their own"),
    "ds.tensor_parallel_size": (lambda size: size > 1, "a head in one piece"),
    "optim": (lambda name: name != "adam", "a matrix for Muon, which a table of users is not"),
}


@dataclass(frozen=True)
class RewardOptions:
    """How a factorized reward model is trained; every field is a flag `--reward.<name>`.

    l2: with it the pairs of a user that are all decided alike end at a probability of about 1 - l2, because there the
    pull of one more such pair, 1 - p, equals that of the penalty l2/2 (|f|^2 + |lambda|^2) along the logit f . lambda.

    Raises:
        ValueError: a value out of range.
    """

    factors: int | None = option(
        None, int, "D: train a reward model with so many base rewards, shared by all users, and D coefficients of each "
        "user. Without it the host trains its one reward as ever."
    )  # fmt: skip
    pooling: str | None = option(
        None, str, "What the base rewards of a text see: the state of its last token, or the mean of all. Default: "
        "that of a factorized --model.model_name_or_path, else last.", ("last", "mean"),
    )  # fmt: skip
    l2: float = option(
        0.02, float, "Weight of the penalty on both factors, l2/2 (|phi_chosen - phi_rejected|^2 + |lambda|^2) of a "
        "pair: on one alone, the other would outgrow it. 0.02 (default): no pair is driven beyond about 98 %."
    )  # fmt: skip
    coefficients_lr: float = option(
        1e-2, float, "Learning rate of the users' coefficients, each of whom is in few steps; --adam.lr is that of all "
        "else. Default 0.01."
    )  # fmt: skip

    def __post_init__(self):
        if self.factors is not None and self.factors < 1:
            raise ValueError(f"--reward.factors needs a number of base rewards >= 1, got {self.factors}")
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise ValueError(f"--reward.l2 needs a finite number >= 0, got {self.l2}")
        if not (math.isfinite(self.coefficients_lr) and self.coefficients_lr > 0):
            raise ValueError(f"--reward.coefficients_lr needs a finite number > 0, got {self.coefficients_lr}")


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds our flags to the host's parser."""
    group = parser.add_argument_group("factorized reward model (openrlhf_pgrpo)")
    _add_device_flag(group, "Where training runs.")
    add_flags(group, "reward", fields(RewardOptions))
    group.add_argument("--data.user_key", default=None, help="Dataset column that names the user of a pair.")
    group.add_argument(
        "--data.preference_key",
        default=None,
        help="Dataset column with the share of the preference that goes to the chosen response, from 0 to 1; 0.5 is a "
        "tie. Default: chosen is preferred, 1.",
    )
    group.add_argument(
        "--reward.metrics_path",
        default=None,
        help="JSONL file with the metrics of each step. Default: metrics.jsonl in --ckpt.output_dir.",
    )


def _add_device_flag(group, text: str) -> None:
    group.add_argument(
        "--pgrpo.device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help=f"{text} auto (default): cpu if this machine has no CUDA device, else gpu.",
    )


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser.

    Raises:
        ValueError: what was needed, what came, what to do.
    """
    flat = vars(args)
    RewardOptions(**{spec.name: flat[f"reward.{spec.name}"] for spec in fields(RewardOptions)})
    if flat["reward.factors"] is None:
        defaults = argparse.ArgumentParser(allow_abbrev=False)
        extend(defaults)
        for name, default in vars(defaults.parse_args([])).items():
            if name != "pgrpo.device" and flat[name] != default:
                raise ValueError(f"--{name} needs --reward.factors, got none: say how many base rewards to train")
        return
    if flat["data.user_key"] is None:
        raise ValueError("--reward.factors needs --data.user_key, got none: name the dataset column of users")
    for name, (refused, need) in REFUSED.items():
        if refused(flat[name]):
            raise ValueError(f"--{name} {flat[name]} needs {need}, got --reward.factors: leave one of them out")


def prepare(args) -> None:
    """Reads the users of the training data, and of a factorized model to start from, for the host's factory.

    Raises:
        ValueError: a column that does not say whose a pair is, or a model that does not fit.
    """
    from openrlhf_pgrpo.host import reward_data, reward_model
    from openrlhf_pgrpo.host.user_rewards import factorized_folder

    start, options = args.model.model_name_or_path, args.reward
    folder = factorized_folder(start)
    if options.factors is None:
        if folder is not None:
            raise ValueError(
                f"--model.model_name_or_path {start} is a factorized reward model and needs --reward.factors and "
                "--data.user_key, got none: add them, or name a plain model"
            )
        return
    users = reward_data.read_users(args)
    if folder is None:
        reward_model.training = reward_model.Training(options.factors, options.pooling or "last", users)
        return
    for flag, here, there in (
        ("reward.factors", options.factors, folder.config.base_rewards),
        ("reward.pooling", options.pooling or folder.config.base_reward_pooling, folder.config.base_reward_pooling),
        ("ds.value_head_prefix", args.ds.value_head_prefix, folder.head_name),
    ):
        if here != there:
            raise ValueError(f"--{flag} needs to be {there}, as in {start}, got {here}: take that, or another model")
    reward_data.check_known(users, folder.users, f"the model {start}")
    reward_model.training = reward_model.Training(options.factors, folder.config.base_reward_pooling, folder.users)


def settings(args) -> dict:
    """Everything that gives head and table their meaning, for the check at resume."""
    from openrlhf_pgrpo.host import reward_model

    return {
        "reward.factors": args.reward.factors,
        "reward.pooling": reward_model.training.pooling,
        "reward.l2": args.reward.l2,
        "data.user_key": args.data.user_key,
        "data.preference_key": args.data.preference_key,
    }


def add_user_flags(group) -> None:
    """Adds `--reward.unknown_user` and `--reward.profiles` to an argparse parser or group."""
    group.add_argument(
        "--reward.unknown_user",
        choices=(ERROR, MEAN),
        default=ERROR,
        help="With a factorized reward model: what a sample of a user gets whom it does not know, or of nobody. error "
        "(default): training or the request ends. mean: the reward of the average user of the model.",
    )
    group.add_argument(
        "--reward.profiles",
        default=None,
        help="With a factorized reward model: a folder of profiles (*.json, made by openrlhf-pgrpo elicit) of users "
        "whom it was not trained on.",
    )


def extend_server(parser: argparse.ArgumentParser) -> None:
    """Adds our flags to the parser of the host's server."""
    group = parser.add_argument_group("factorized reward model (openrlhf_pgrpo)")
    _add_device_flag(group, "Where the model runs.")
    add_user_flags(group)
    group.add_argument(
        "--reward.user_key",
        default="user",
        help="A label is the user, or an object that holds the user under this key. Default: user.",
    )


def prepare_server(args) -> None:
    """Serves a factorized model in the place of the host's script, which goes on with any other.

    Raises:
        ValueError: a profile that does not fit, or our flags for a plain model.
    """
    from openrlhf_pgrpo.host.user_rewards import factorized_folder

    folder = factorized_folder(args.reward.model_name_or_path)
    if folder is not None:
        from openrlhf_pgrpo.host.reward_server import serve

        serve(args, folder)
    if args.reward.profiles or args.reward.unknown_user != ERROR:
        raise ValueError("--reward.profiles and --reward.unknown_user need a factorized reward model, got a plain one")


def metrics_path(args) -> str:
    return args.reward.metrics_path or os.path.join(args.ckpt.output_dir, "metrics.jsonl")
