"""Ray calls `setup` first in every worker, also in those of vLLM. Light: nothing heavy is imported here."""

import os
import subprocess
from pathlib import Path

from openrlhf_pgrpo.host import hooks
from openrlhf_pgrpo.host.ppo.seams import SEAMS

# It waits for the end of the worker, which holds the other end of the pipe, and kills the worker's process group.
GUARD = "trap '' INT TERM HUP; read _; kill -KILL 0"


def setup() -> None:
    """Registers our hooks in this process; Ray's `worker_process_setup_hook`."""
    hooks.register(SEAMS)
    if Path(f"/proc/{os.getppid()}/comm").read_text() == "raylet\n" and setup.guard is None:
        setup.guard = guarded()


setup.guard = None


def guarded() -> subprocess.Popen:
    """What this process has started ends with it, in whatever way it ends, by a shell that outlives it for a moment.

    vLLM computes in a process of its own, which would outlive a rollout engine, and keep its memory. Ray can do the
    same for a worker that was killed (`RAY_process_group_cleanup_enabled`), but nothing once Ray itself was killed, as
    it is with the driver that started it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    return subprocess.Popen(["sh", "-c", GUARD], stdin=subprocess.PIPE)
