"""A resumed run has the learning rates of its flags.

DeepSpeed restores the rates that a checkpoint was made with, so that a run that has diverged could not go on with
lower ones: the flag did nothing. Here the flag counts. The schedule goes on where it was, and what a plateau has taken
off (`--robust.plateau`) stays off. It runs in every DeepSpeed rank.
"""


def of_flags(engine) -> list[float]:
    """The rate of each group of parameters, before a checkpoint is loaded; none of a model that does not train."""
    if getattr(engine, "optimizer", None) is None or engine.lr_scheduler is None:
        return []
    return [group["initial_lr"] for group in engine.optimizer.param_groups]


def keep(strategy, engine, rates: list[float]) -> None:
    """Puts the rates of `of_flags` in the place of those that a checkpoint has brought; says it if they differ."""
    if not rates:
        return
    groups, schedule = engine.optimizer.param_groups, engine.lr_scheduler
    saved = [group["initial_lr"] for group in groups]
    if saved == rates:
        return
    lowered = [base / was if was else 1.0 for base, was in zip(schedule.base_lrs, saved)]
    schedule.base_lrs = [part * rate for part, rate in zip(lowered, rates)]
    for group, was, rate in zip(groups, saved, rates):
        group["initial_lr"] = rate
        group["lr"] *= rate / was if was else 1.0  # the next step has its rate already
    there, here = (", ".join(f"{rate:g}" for rate in dict.fromkeys(some)) for some in (saved, rates))
    strategy.print(f"[pgrpo] the learning rate is {here} from here on; the checkpoint was made with {there}")
