"""Our flags on the parser of the host's preference trainer, and what they refuse."""

import argparse
import os

from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.host import flags

# The other options are for samples drawn online. Here pairs are drawn from all data, and the paper clips no weight.
USED = ("eta", "chi", "mu")


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds `--robust.*` and the flags of all trainers to the host's parser."""
    group = parser.add_argument_group("group-robust preference optimisation (openrlhf_pgrpo)")
    flags.add_device(group, "Where training runs.")
    flags.add_trust(group)
    _add_robust_flags(group)


def _add_robust_flags(group) -> None:
    flags.add_metrics_path(group)
    group.add_argument(
        f"--{flags.PREF_GROUP_KEY}",
        default=None,
        help="Dataset column that names the preference group of a pair. Without it the host trains as usual.",
    )
    flags.add_options(group, "robust", RobustOptions, USED)
    group.add_argument(
        "--robust.weights",
        choices=("exact", "previous"),
        default="exact",
        help="Which weights a step uses. exact (default): those updated by its own losses, as in Algorithm 1; with "
        "several micro batches a step, all of them first run without gradient, which costs about one forward "
        "pass. previous: those of the step before, at no cost.",
    )
    group.add_argument(
        "--robust.save_best",
        action="store_true",
        help="Keep a checkpoint, best_global_stepN in --ckpt.path, of the evaluation in which the worst preference "
        "group had its lowest loss.",
    )
    group.add_argument(
        "--robust.patience",
        type=int,
        default=0,
        help="After so many evaluations in which the loss of the worst preference group reached no new low, do what "
        "--robust.plateau says. Default 0: never. The paper's code uses 4.",
    )
    group.add_argument(
        "--robust.plateau",
        choices=("stop", "reduce_lr"),
        default="stop",
        help="What to do after --robust.patience evaluations. stop (default): training ends. reduce_lr: the learning "
        "rate falls to a tenth and eta to a half, as in the paper's code, and training ends once the rate is below "
        "1e-8.",
    )


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser.

    Raises:
        ValueError: the message says what is needed, what was given and what to do.
    """
    flat = vars(args)
    flags.read_options(RobustOptions, "robust", flat, USED)
    if flat["robust.patience"] < 0:
        raise ValueError(f"--robust.patience needs a number of evaluations >= 0, got {flat['robust.patience']}")
    for name in ("save_best", "patience"):
        if flat[f"robust.{name}"] and not flat["eval.dataset"]:
            raise ValueError(f"--robust.{name} needs --eval.dataset, got none: name pairs to evaluate on")
    given = flags.set_flags(_add_robust_flags, flat)
    if given and flat[flags.PREF_GROUP_KEY] is None:
        raise ValueError(
            f"--{', --'.join(given)} needs --{flags.PREF_GROUP_KEY}, got none: name the column of preference groups"
        )
    _refuse_idle(given, flat)


def _refuse_idle(given: list[str], flat: dict) -> None:
    """Refuses flags that do nothing beside the others; `given` are those of ours that have not their default value."""
    patience = flat["robust.patience"]
    of_plateau = ("robust.plateau", "--robust.patience above 0", patience, patience == 0)
    flags.refuse_idle(given, *flags.idle_at_chi(flat), of_plateau)
    if flat["robust.save_best"] and flat["ckpt.disable_ds"] and not flat["ckpt.save_hf"]:
        raise ValueError(
            "--robust.save_best needs something to keep, got --ckpt.disable_ds without --ckpt.save_hf: leave "
            "--ckpt.disable_ds out, or add --ckpt.save_hf"
        )
    if flat["model.ipo_enable"] and flat["model.label_smoothing"]:
        raise ValueError(
            "--model.label_smoothing needs the loss of DPO, got --model.ipo_enable, which does not read it: leave "
            "one of them out"
        )


def robust_options(args) -> RobustOptions:
    """The options of the weights, from nested host arguments."""
    return flags.read_options(RobustOptions, "robust", flags.flatten(args), USED)


def method(args) -> str:
    """What this training is called in logs: GR-DPO, IS-IPO, ..."""
    return ("IS" if args.robust.chi == 0 else "GR") + ("-IPO" if args.model.ipo_enable else "-DPO")


def settings(args) -> dict:
    """Everything that gives the weights their meaning, for the check at resume."""
    names = ["data.pref_group_key", "robust.weights", *(f"robust.{name}" for name in USED)]
    names += ["model.ipo_enable", "model.beta", "model.label_smoothing"]
    flat, reference = flags.flatten(args), args.ref.model_name_or_path
    # Without the flag the host names the policy, which may lie elsewhere in each job.
    other = None if reference == args.model.model_name_or_path else reference
    if other is not None and os.path.isdir(other):
        other = os.path.realpath(other)
    return {**{name: flat[name] for name in names}, "ref.model_name_or_path": other}
