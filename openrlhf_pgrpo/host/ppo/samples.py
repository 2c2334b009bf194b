"""What is replaced in the host's module of the samples generator, which several files here share."""

from openrlhf_pgrpo.host.ppo import loader, rewards, waiting


def install(module) -> None:
    """Installs checks of responses, what a long rollout says, and whole updates."""
    rewards.install_samples(module)
    waiting.install(module)
    loader.install_whole_updates(module)
