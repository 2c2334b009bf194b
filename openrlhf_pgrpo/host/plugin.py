"""Our entry point in the group `openrlhf.plugins`, for a host that loads plug-ins (docs/upstream/plugins.md).

No released host does so yet. One that does calls `activate` when it is imported, if OPENRLHF_PLUGINS names `pgrpo`.
Then `python -m openrlhf.cli.train_ppo_ray` takes our flags without a patch.
"""

import sys


def activate() -> None:
    """Opens the door to the host's script that this process runs; does nothing in any other process.

    Ray's workers get our hooks from the driver, as always.
    """
    script = started_module()
    if script is None:
        return
    from openrlhf_pgrpo.host import doors  # not in every process that imports the host

    for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE):
        if door.script == script:
            sys.argv[0] = script  # messages name it; Python sets this to the file afterwards
            door.open()


def started_module() -> str | None:
    """What `python -m` is about to run, while it imports the packages around it; else None."""
    if sys.argv[0] != "-m":
        return None
    words_of_python = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    return words_of_python[-1].removeprefix("-m")
