"""The estimator's state in the host's checkpoints: exact, under one key, refused when it does not fit.

The host saves `client_states` with every regular and best checkpoint, on the actor group. The experience maker holds
that group, so wrapping one method of this one instance reaches sync and async training and both kinds of checkpoint.
The group calls the methods of its actors by name, so the wrapper looks at the name.
"""

from copy import deepcopy

import ray

from openrlhf_pgrpo.host import resume

# What the host begins with; its trainer asks for it even if it has found no checkpoint to load.
ANEW = {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}
OTHERWISE = "pass --pgrpo.fresh_history to start with an empty history"


def attach(actor_group, owner) -> None:
    """Lets `owner.checkpoint_state()` travel with every checkpoint of `actor_group`, and `owner.restore(state)` see
    what a resumed run finds there (None if the checkpoint was saved without this add-on)."""
    run = actor_group.async_run_method

    def async_run_method(method_name, *args, **kwargs):
        if method_name == "save_checkpoint":
            # A copy, made now: saving is asynchronous, and the host reuses the dictionary of an earlier save.
            state = {"schema": resume.SCHEMA, **deepcopy(owner.checkpoint_state())}
            # By reference, so that it is sent once for all ranks.
            kwargs["client_states"] = ray.put({**(kwargs.get("client_states") or {}), resume.KEY: state})
        refs = run(method_name, *args, **kwargs)
        if method_name == "get_checkpoint_states":
            states = ray.get(refs[0])
            if not states:  # there was no whole checkpoint
                return [ray.put(ANEW), *refs[1:]]
            owner.restore(states.get(resume.KEY))
        return refs

    actor_group.async_run_method = async_run_method
