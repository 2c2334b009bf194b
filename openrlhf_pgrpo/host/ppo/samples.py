"""What is replaced in the host's module of the samples generator, which several files here share."""

from openrlhf_pgrpo.host.ppo import loader, rewards, tokenizer, waiting


def install(module) -> None:
    """Installs checks of responses, what a long rollout says, whole updates, and a tokenizer that is sent once."""
    rewards.install_samples(module)
    waiting.install(module)
    loader.install_whole_updates(module)
    tokenizer.install(module)
