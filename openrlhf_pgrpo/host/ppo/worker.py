"""Ray calls `setup` first in every worker, also in those of vLLM. Light: nothing heavy is imported here."""

from openrlhf_pgrpo.host import hooks
from openrlhf_pgrpo.host.ppo.seams import SEAMS


def setup() -> None:
    """Registers our hooks in this process; Ray's `worker_process_setup_hook`."""
    hooks.register(SEAMS)
