"""What is replaced in the host's module of the PPO trainer, which several files here share."""

from openrlhf_pgrpo.host.ppo import loader, metrics


def install(module) -> None:
    """Installs the prompts of a run and what it logs."""
    loader.install(module)
    metrics.install(module)
