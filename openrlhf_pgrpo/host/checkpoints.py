"""The estimator's state in the host's checkpoints: exact, under one key, refused when it does not fit.

The host saves `client_states` with every regular and best checkpoint, on the actor group. The experience maker holds
that group, so wrapping one method of this one instance reaches sync and async training and both kinds of checkpoint.
"""

from copy import deepcopy

KEY = "openrlhf_pgrpo"
SCHEMA = 1


def attach(actor_group, owner) -> None:
    """Lets `owner.checkpoint_state()` travel with every checkpoint of `actor_group`, and `owner.restore(state)` see
    what a resumed run finds there (None if the checkpoint was saved without this add-on)."""
    import ray  # here, because the preference trainer shares the rest of this file and starts without it

    run = actor_group.async_run_method

    def async_run_method(method_name, *args, **kwargs):
        if method_name == "save_checkpoint":
            # A copy, made now: saving is asynchronous, and the host reuses the dictionary of an earlier save.
            state = {"schema": SCHEMA, **deepcopy(owner.checkpoint_state())}
            # By reference, so that it is sent once, however many ranks there are.
            kwargs["client_states"] = ray.put({**(kwargs.get("client_states") or {}), KEY: state})
        refs = run(method_name, *args, **kwargs)
        if method_name == "get_checkpoint_states":
            owner.restore(_readable(ray.get(refs[0]).get(KEY)))
        return refs

    actor_group.async_run_method = async_run_method


def _readable(state: dict | None) -> dict | None:
    if state is None:
        return None
    if state.get("schema") != SCHEMA:
        raise ValueError(
            f"resuming needs a checkpoint of schema {SCHEMA}, got schema {state.get('schema')!r}: resume with the "
            "openrlhf_pgrpo version that wrote it, or pass --pgrpo.fresh_history to start with an empty history"
        )
    return {key: value for key, value in state.items() if key != "schema"}


def check_settings(saved: dict, current: dict) -> None:
    """Refuses a history made under other settings.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    if unlike := differing(saved, current):
        pairs = [f"{name}: {there!r} in the checkpoint, {here!r} now" for name, there, here in unlike]
        raise ValueError(
            f"resuming needs the settings under which the history was made, got {'; '.join(pairs)}. Use the values of "
            "the checkpoint, or pass --pgrpo.fresh_history to start with an empty history"
        )


def differing(saved: dict, current: dict) -> list[tuple]:
    """(name, saved value, current value) of each setting that is not the same in both; a missing one is None."""
    pairs = [(name, saved.get(name), current.get(name)) for name in sorted(saved.keys() | current.keys())]
    return [(name, there, here) for name, there, here in pairs if there != here]
