"""The state of group-robust training in the checkpoints of the host's preference trainer: exact, under one key.

The host saves whatever its trainer hands over. When it loads, there is no trainer yet, and its script keeps only the
number of consumed samples. So we keep the rest on the strategy until the trainer takes it.
"""

import wrapt

from openrlhf_pgrpo.host import resume, whole_checkpoints
from openrlhf_pgrpo.host.flags import PREF_GROUP_KEY


def install(module) -> None:
    """Makes `DeepspeedStrategy.load_ckpt` remember, in `client_states`, what a checkpoint holds besides the model."""
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.load_ckpt", whole_checkpoints.keep_states)


def saved_state(strategy, settings: dict) -> dict | None:
    """Our state in the checkpoint that this run resumed; None if it resumed none.

    Raises:
        ValueError: it holds nothing for us, or a state of another schema or made under other settings.
    """
    if not hasattr(strategy, "client_states"):
        return None
    state = strategy.client_states.get(resume.KEY)
    resume.check_schema(state, "group-robust weights", resume.ANEW)
    resume.check_settings(state["settings"], settings, resume.ANEW)
    return state


def refuse_robust(strategy) -> None:
    """For a run of the host's own method.

    Raises:
        ValueError: it resumed a checkpoint of group-robust training, whose weights it would drop.
    """
    state = getattr(strategy, "client_states", {}).get(resume.KEY)
    if state is not None:
        resume.check_schema(state, "group-robust weights", resume.ANEW)
        resume.check_settings(state["settings"], {**state["settings"], PREF_GROUP_KEY: None}, resume.ANEW)
