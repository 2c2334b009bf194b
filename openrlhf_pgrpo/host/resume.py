"""Our part of a checkpoint: one key of the host's client states, and the refusal of a checkpoint that does not fit.

The state of a method means something only under the settings it was made with, so these are saved beside it.
"""

KEY = "openrlhf_pgrpo"
SCHEMA = 2


def check_schema(state: dict | None, content: str, otherwise: str) -> None:
    """Raises ValueError unless `state`, what a checkpoint holds under KEY, is one that this version can read.

    Args:
        content: what the checkpoint must hold, in words. otherwise: what to do if it does not.
    """
    if state is None or state.get("schema") != SCHEMA:
        found = "one without" if state is None else f"schema {state.get('schema')!r}"
        raise ValueError(
            f"resuming needs a checkpoint that holds {content} in schema {SCHEMA}, got {found}: resume it with the "
            f"flags and the version that wrote it, or {otherwise}"
        )


def check_settings(saved: dict, current: dict, otherwise: str, *others: str) -> None:
    """Refuses a checkpoint that was made under other settings.

    Args:
        others: what else differs, in words. otherwise: what to do instead of using the settings of the checkpoint.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    pairs = [(name, saved.get(name), current.get(name)) for name in sorted(saved.keys() | current.keys())]
    told = [f"--{name} {there!r} in the checkpoint, {here!r} now" for name, there, here in pairs if there != here]
    told.extend(others)
    if told:
        raise ValueError(
            f"resuming needs the settings of the checkpoint, got {'; '.join(told)}: use those, or {otherwise}"
        )
