"""Our flags on the parser of the host's preference trainer, and what they refuse."""

import argparse
import os
from dataclasses import fields

from openrlhf_pgrpo.core.options import add_flags
from openrlhf_pgrpo.core.robust import RobustOptions

FLAG = "model.ipo_enable"

# The others are for samples drawn online: pairs are drawn from all data, and the paper clips no weight.
USED = ("eta", "update", "smoothing", "adjustment", "floor", "chi", "mu")
SPECS = [spec for spec in fields(RobustOptions) if spec.name in USED]


def extend(parser: argparse.ArgumentParser) -> None:
    """Adds `--robust.*`, and `--pgrpo.device`, to the host's parser."""
    group = parser.add_argument_group("group-robust preference optimisation (openrlhf_pgrpo)")
    group.add_argument(
        "--pgrpo.device",
        choices=("auto", "gpu", "cpu"),
        default="auto",
        help="Where training runs. auto (default): cpu if this machine has no CUDA device, else gpu.",
    )
    group.add_argument(
        "--robust.group_key",
        default=None,
        help="Dataset column that names the preference group of a pair. Without it the host trains as ever.",
    )
    add_flags(group, "robust", SPECS)
    group.add_argument(
        "--robust.weights",
        choices=("exact", "previous"),
        default="exact",
        help="Which weights a step uses. exact (default): those updated by its own losses, as in Algorithm 1; with "
        "several micro batches a step all of them are seen without gradient first, which costs about one forward "
        "pass. previous: those of the step before, at no cost.",
    )
    group.add_argument(
        "--robust.save_best",
        action="store_true",
        help="Keep a checkpoint, best_global_stepN in --ckpt.path, of the lowest loss that the worst preference group "
        "had in an evaluation.",
    )
    group.add_argument(
        "--robust.patience",
        type=int,
        default=0,
        help="Evaluations without a lower loss of the worst preference group until --robust.plateau happens. "
        "Default 0: never. The paper's code takes 4.",
    )
    group.add_argument(
        "--robust.plateau",
        choices=("stop", "reduce_lr"),
        default="stop",
        help="What happens then. stop (default): training ends. reduce_lr: the learning rate falls to a tenth and eta "
        "to a half, as in the paper's code, and training ends once the rate is below 1e-8.",
    )
    group.add_argument(
        "--robust.metrics_path",
        default=None,
        help="JSONL file with the metrics of each step. Default: metrics.jsonl in --ckpt.output_dir.",
    )


def check(args: argparse.Namespace) -> None:
    """Validates our flags in the flat namespace of the host's parser.

    Raises:
        ValueError: what was needed, what came, what to do.
    """
    flat = vars(args)
    RobustOptions(**{name: flat[f"robust.{name}"] for name in USED})
    if flat["robust.patience"] < 0:
        raise ValueError(f"--robust.patience needs a number of evaluations >= 0, got {flat['robust.patience']}")
    for name in ("save_best", "patience"):
        if flat[f"robust.{name}"] and not flat["eval.dataset"]:
            raise ValueError(f"--robust.{name} needs --eval.dataset, got none: name pairs to evaluate on")
    if flat["robust.group_key"] is None:
        defaults = argparse.ArgumentParser(allow_abbrev=False)
        extend(defaults)
        for name, default in vars(defaults.parse_args([])).items():
            if name.startswith("robust.") and flat[name] != default:
                raise ValueError(f"--{name} needs --robust.group_key, got none: name the column of preference groups")


def robust_options(args) -> RobustOptions:
    """How weights move, as the nested host arguments say."""
    return RobustOptions(**{name: getattr(args.robust, name) for name in USED})


def method(args) -> str:
    """What this training is called in logs: GR-DPO, IS-IPO, ..."""
    return ("IS" if args.robust.chi == 0 else "GR") + ("-IPO" if args.model.ipo_enable else "-DPO")


def settings(args) -> dict:
    """Everything that gives the weights their meaning, for the check at resume."""
    return {
        "robust.group_key": args.robust.group_key,
        "robust.weights": args.robust.weights,
        **{f"robust.{name}": getattr(args.robust, name) for name in USED},
        "model.ipo_enable": args.model.ipo_enable,
        "model.beta": args.model.beta,
        "model.label_smoothing": args.model.label_smoothing,
    }


def metrics_path(args) -> str:
    return args.robust.metrics_path or os.path.join(args.ckpt.output_dir, "metrics.jsonl")
