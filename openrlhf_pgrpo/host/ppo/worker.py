"""Ray calls `setup` first in every worker, also in those of vLLM. Light: nothing heavy is imported here."""

import os
import subprocess

from openrlhf_pgrpo.host import hooks
from openrlhf_pgrpo.host.ppo.seams import SEAMS

# It waits for the end of the worker, which holds the other end of the pipe, and kills the worker's process group.
GUARD = "trap '' INT TERM HUP; read _; kill -KILL 0"


def setup() -> None:
    """Registers our hooks in this process, and lets nothing that it starts outlive it; Ray's setup hook of workers."""
    hooks.register(SEAMS)
    if setup.guard is None:
        setup.guard = guard()


setup.guard = None


def guard() -> subprocess.Popen:
    """What this process has started ends with it, in whatever way it ends, by a shell that outlives it for a moment.

    vLLM computes in a process of its own, which would outlive a rollout engine, and keep its memory. Ray can do the
    same for a worker that was killed (`RAY_process_group_cleanup_enabled`), but nothing once Ray itself was killed, as
    it is with the driver that started it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    reading, writing = os.pipe()
    # This process leaves `writing` to the system: Python closes its files before a process has ended. A fork may
    # outlive it, so it closes its copy, once: in a fork of the fork that number may be another file's.
    to_close = [writing]
    os.register_at_fork(after_in_child=lambda: to_close and os.close(to_close.pop()))
    shell = subprocess.Popen(["sh", "-c", GUARD], stdin=reading)
    os.close(reading)
    return shell
