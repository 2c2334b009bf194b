"""The state of group-robust training in the checkpoints of the host's preference trainer: exact, under one key.

The host saves whatever its trainer hands over, but of what it finds on loading its script keeps the number of consumed
samples alone, before there is a trainer. So the rest is remembered on the strategy, for the trainer to take.
"""

import wrapt

from openrlhf_pgrpo.host import whole_checkpoints
from openrlhf_pgrpo.host.checkpoints import KEY, SCHEMA, differing


def install(module) -> None:
    """Makes `DeepspeedStrategy.load_ckpt` remember, in `client_states`, what a checkpoint holds besides the model."""

    def load(wrapped, strategy, args, kwargs):
        path, states = wrapped(*args, **kwargs)
        if path is not None:
            strategy.client_states = states
        return path, states

    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.load_ckpt", load)
    whole_checkpoints.install(module)


def saved_state(strategy, settings: dict) -> dict | None:
    """What the checkpoint that this run resumed holds for us; None if none was resumed.

    Raises:
        ValueError: it holds nothing for us, or a state of another schema or made under other settings; all that differ
            are named.
    """
    if not hasattr(strategy, "client_states"):
        return None
    state = strategy.client_states.get(KEY)
    if state is None or state["schema"] != SCHEMA:
        found = "one without" if state is None else f"schema {state['schema']!r}"
        raise ValueError(
            f"resuming needs a checkpoint that holds group-robust weights in schema {SCHEMA}, got {found}: resume it "
            "with the flags and the version that wrote it, or start anew without --ckpt.load_enable"
        )
    if unlike := differing(state["settings"], settings):
        pairs = [f"--{name} {there!r} in the checkpoint, {here!r} now" for name, there, here in unlike]
        raise ValueError(
            f"resuming needs the settings under which the weights were made, got {'; '.join(pairs)}: use those of the "
            "checkpoint, or start anew without --ckpt.load_enable"
        )
    return state
