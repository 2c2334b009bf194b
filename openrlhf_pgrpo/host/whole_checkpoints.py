"""A checkpoint is whole or not there, and an older one is deleted only after the newer one is whole.

The host deletes old checkpoints before it writes the next one, even the one that a resume would load. DeepSpeed then
names the next one in `latest` while other ranks may still be writing. A full disk or a killed rank at that moment
leaves nothing to resume from. Here the host writes into a folder of ours beside its checkpoints. When all ranks are
done, rank 0 moves the checkpoint to its place, names it in `latest`, and then deletes older checkpoints by the host's
rules. The host would also count and delete other folders that lie there. Here only checkpoints are.

A resume loads a checkpoint that is whole, or says that there is none and starts anew. It has the learning rates of its
flags, and a policy and a critic of one step.

It runs in every DeepSpeed rank, in PPO too. Remove it once the host saves before it deletes, and DeepSpeed updates
`latest` only after all ranks are done.
"""

import inspect
import math
import os
import shutil
from pathlib import Path

import wrapt

from openrlhf_pgrpo.files import to_disk, write_whole
from openrlhf_pgrpo.host import device, flags, learning_rates, resume, saved_models

UNFINISHED = ".openrlhf_pgrpo-unfinished"


def install(module) -> None:
    """Wraps what `DeepspeedStrategy` does with checkpoints, and with the model that a run leaves.

    Install it last: it comes before all else that wraps these methods.
    """
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.__init__", announce)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.save_ckpt", save_whole)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.load_ckpt", load_whole)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.save_model", flags.in_our_runs(saved_models.save))


def announce(init, strategy, args, kwargs) -> None:
    """The host's `DeepspeedStrategy.__init__`, which the driver of PPO and each rank of other trainers call once. Says
    at the start if there is nothing to resume.

    Raises:
        ValueError: as `resume.latest` and `_check`.
    """
    init(*args, **kwargs)
    options = strategy.args.ckpt
    if not options.load_enable or strategy.use_ds_universal_ckpt:
        return
    folder = Path(options.path)
    if hasattr(strategy.args, "rollout"):  # PPO; the critic's checkpoint lies beside the policy's
        policy = folder / "_actor"
        if not policy.exists() and device.cluster() is not None:
            return  # this machine cannot tell
        folder = policy if folder.exists() else folder
    if resume.latest(folder) is not None:
        _check(strategy.args, folder)
    elif os.environ.get("RANK", "0") == "0":
        print(f"[pgrpo] {resume.nothing_to_load(folder)}", flush=True)


def _check(args, folder: Path) -> None:
    """Looks whether a run can go on from what is in the folder of the policy's checkpoints, or the critic's.

    Raises:
        ValueError: it would go on with something that no checkpoint holds, or with a critic of another step.
    """
    if getattr(args.train, "enable_ema", False):
        raise ValueError(
            "--train.enable_ema needs a run that begins anew, got a checkpoint to resume, which does not hold the "
            "average: most of it would be the untrained model. Leave it out, or start without --ckpt.load_enable"
        )
    if not hasattr(args, "rollout") or args.algo.advantage.estimator != "gae":
        return
    parts = [folder.parent / part for part in ("_actor", "_critic")]
    found = {part.name: resume.latest(part) for part in parts}
    if len({*found.values()}) == 1:
        return
    if both := set.intersection(*({*resume.whole(part)} for part in parts)):
        raise ValueError(
            f"resuming needs policy and critic of one step, got {found} in {folder.parent}: write the name of one "
            f"that both have into both files `latest`, such as {max(both)}"
        )
    print(f"[pgrpo] warning: policy and critic go on from different steps, {found}: none is there of both", flush=True)


def load_whole(load, strategy, args, kwargs) -> tuple:
    """The host's `load_ckpt`, on every rank, with the same arguments. Returns (None, {}) if there is nothing whole.

    What a checkpoint holds besides the model is kept as `strategy.client_states`: when the trainers on pairs load,
    there is no trainer yet, and their script keeps one number alone.

    Raises:
        ValueError: as `resume.latest` and `_check`.
    """
    call = inspect.signature(load).bind(*args, **kwargs).arguments
    folder = Path(call["load_dir"])
    if call.get("tag") is None and not strategy.use_ds_universal_ckpt and resume.latest(folder) is None:
        strategy.print(f"[pgrpo] {resume.nothing_to_load(folder)}")
        return None, {}
    if flags.are_ours(getattr(strategy, "args", None)) and not strategy.use_ds_universal_ckpt:
        _check(strategy.args, folder)
    rates = learning_rates.of_flags(call["model"])
    path, states = load(*args, **kwargs)
    if path is not None:
        learning_rates.keep(strategy, call["model"], rates)
        strategy.client_states = states
    return path, states


def save_whole(save, strategy, args, kwargs) -> None:
    """The host's `save_ckpt`, on every rank, with the same arguments.

    Raises:
        RuntimeError: this rank could not write. Earlier checkpoints are still whole.
    """
    call = inspect.signature(save).bind(*args, **kwargs)
    call.apply_defaults()
    asked = call.arguments
    folder, tag = Path(asked["save_dir"]), asked["tag"]
    unfinished = folder / UNFINISHED
    try:
        if strategy.is_rank_0() and unfinished.exists():  # from a run that ended while it wrote
            shutil.rmtree(unfinished)
        save(**{**asked, "save_dir": str(unfinished), "save_latest": False})  # returns when all ranks have written
        if strategy.is_rank_0():
            _put_in_place(unfinished / tag, folder / tag)
            if asked["save_latest"]:
                write_whole(folder / "latest", tag)
            shutil.rmtree(unfinished)
    except (OSError, RuntimeError) as error:
        # "inline_container": PyTorch could not write a file to its end. Other errors mean that a rank died.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free / 2**30
        raise RuntimeError(
            f"the checkpoint {tag} could not be written to {folder}, where {free:.1f} GiB are free: {error}. The one "
            "before it is still whole: make room, then resume with --ckpt.load_enable"
        ) from error
    if strategy.is_rank_0():
        for old in _to_delete(folder, tag, asked["max_num"], asked["max_mem"], strategy._read_ckpt_metric):
            shutil.rmtree(old)
            strategy.print(f"Deleted checkpoint {old}")


def _put_in_place(new: Path, place: Path) -> None:
    for path in new.rglob("*"):
        if path.is_file():
            to_disk(path)
    if place.exists():  # from an earlier run into this folder, or from one that ended before it wrote `latest`
        os.rename(place, new.with_name("replaced"))
    os.rename(new, place)


def _to_delete(folder: Path, newest: str, most: int, most_gib: float, metric) -> list[Path]:
    """Which checkpoints go, by the host's rules, but never `newest`, which a resume would load.

    Only folders that bear a checkpoint's name count, and links never: what else lies there belongs to somebody else.

    A new best checkpoint replaces all older best ones. Regular ones are deleted until at most `most` are left and,
    with the best ones, they take at most `most_gib`. Those without a metric go first, then those with the lowest
    metric, then the oldest.
    """
    found = [
        path
        for path in folder.iterdir()
        if resume.CHECKPOINT.fullmatch(path.name) and path.name != newest and path.is_dir() and not path.is_symlink()
    ]
    best = [path for path in found if path.name.startswith("best")]
    if newest.startswith("best"):
        return best

    def least_valuable(path):
        value = metric(str(path))
        return value is not None, -math.inf if value is None else value, path.stat().st_mtime

    regular = sorted((path for path in found if path not in best), key=least_valuable)
    sizes = {path: _size(path) for path in [*found, folder / newest]}
    count, size = 1 + len(regular), sum(sizes.values())
    for deleted, path in enumerate(regular):
        if count - deleted <= most and size <= most_gib * 2**30:
            return regular[:deleted]
        size -= sizes[path]
    return regular


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
