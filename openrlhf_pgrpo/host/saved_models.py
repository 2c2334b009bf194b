"""The model that a run leaves: not that of a run that made no update, and readable as the umask says.

The host saves a model after the last step, whether or not there was a step. Prompts may all have been filtered, the
policy may have been frozen for as long as the run was, the data may fill no batch, or every gradient may have been
nan, which DeepSpeed leaves out silently. Then the saved weights are those that the run began with, under the name of
trained ones. Where it does not leave them out, as in bfloat16, the weights may have become nan, and with them every
answer. It runs in every DeepSpeed rank.
"""

import inspect
import math
from pathlib import Path

import torch
from torch import distributed


def save(save_model, strategy, args, kwargs) -> None:
    """The host's `save_model`, on every rank, with the same arguments. A copy in the middle of a run is left out, with
    a line, as long as there was no update. Updates that DeepSpeed left out are said at the end.

    Raises:
        RuntimeError: the run has ended without an update, or a weight is not finite. Nothing is saved.
    """
    call = inspect.signature(save_model).bind(*args, **kwargs).arguments
    model, folder = call["model"], Path(call["output_dir"])
    if updates(strategy, model) == 0:
        if folder != Path(strategy.args.ckpt.output_dir):
            strategy.print(f"[pgrpo] no update has been made yet, so no model is saved to {folder}")
            return
        raise RuntimeError(
            f"training needs at least one update, got none{_reason(model)}: nothing is saved to {folder}"
        )
    # A rank may hold only its part of the weights, and all ranks have to leave here together.
    if strategy.all_reduce(float(_not_finite(model)), op="max"):
        raise RuntimeError(
            f"training needs finite weights, got nan or inf after {updates(strategy, model)} updates: nothing is "
            f"saved to {folder}; resume from an earlier checkpoint, or start anew, with a lower learning rate"
        )
    save_model(*args, **kwargs)
    if strategy.is_rank_0():
        share(folder)
    if folder == Path(strategy.args.ckpt.output_dir) and (skipped := _engine(model).skipped_steps):
        strategy.print(
            f"[pgrpo] warning: {skipped} of {_engine(model).global_steps} updates were left out, because their "
            "gradients were not finite"
        )


def updates(strategy, model) -> int:
    """How many updates a model of the host has had, those before a resume included, and skipped steps not."""
    engine = _engine(model)
    if engine.optimizer_name() is None:  # a moving average: DeepSpeed may still give its engine an `optimizer`
        return strategy.time_steps["ema"]
    return engine.global_steps - engine.skipped_steps


def _not_finite(model) -> bool:
    """Whether a weight that this rank holds is nan or inf. One sum a tensor, which needs no memory of its own."""
    held = map(_held, model.parameters())
    return not all(math.isfinite(tensor.detach().sum(dtype=torch.float32).item()) for tensor in held)


def _held(parameter) -> torch.Tensor:
    """What this rank has of a weight. With ZeRO-3 that is one of equal parts, and nobody writes what is beyond the end
    of the weight."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part = parameter.ds_tensor
    start = part.numel() * distributed.get_rank(parameter.ds_process_group)
    return part[: max(0, parameter.ds_numel - start)]


def _engine(model):
    """DeepSpeed's engine: the host wraps that of a policy."""
    return model if hasattr(model, "global_steps") else model.model


def _reason(model) -> str:
    skipped = _engine(model).skipped_steps
    if skipped:
        return (
            f" ({skipped} steps were left out, because gradients were not finite: look for rewards or losses that are "
            "not, or lower the learning rate)"
        )
    return (
        " (were all samples filtered, is there less data than --train.batch_size, or is the policy frozen for longer "
        "than the run, by --critic.freezing_steps?)"
    )


def share(folder: Path) -> None:
    """Gives weights the mode of config.json, which the umask gave: safetensors writes files for their owner alone."""
    config = folder / "config.json"
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        if config.is_file() and not path.is_symlink():
            path.chmod(config.stat().st_mode & 0o777)
