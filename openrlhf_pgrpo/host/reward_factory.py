"""The factorized reward model in the host's own factory, which training, serving and PPO all go through.

A folder with the config of a factorized model becomes our class, and so does a plain backbone that a training of ours
starts from. For everything else the host builds its own class, by its own code.
"""

from functools import wraps
from inspect import unwrap
from typing import NamedTuple

from openrlhf_pgrpo.models.folder import describe, is_factorized
from openrlhf_pgrpo.models.network import factorized_reward_model


class NewModel(NamedTuple):
    """What training turns a plain backbone into: D base rewards, and how a text becomes one state."""

    factors: int
    pooling: str


class Factory:
    """Replaces the class of a reward model in the host. It chooses the class in `from_pretrained`, where the config is
    known."""

    def __init__(self, host_factory, new: NewModel | None, *classes):
        self.host_factory, self.new, self.classes = host_factory, new, classes

    def from_pretrained(self, name, *, config, **kwargs):
        starts = self.new is not None and not is_factorized(config)
        if starts:
            # The table of users has one row for now, because the host has not read its data yet.
            describe(config, self.new.factors, 1, self.new.pooling)
        if not is_factorized(config):
            return self.host_factory(*self.classes).from_pretrained(name, config=config, **kwargs)
        model, report = factorized_reward_model(*self.classes).from_pretrained(
            name, config=config, output_loading_info=True, **kwargs
        )
        missing = report["missing_keys"] & {f"{model.value_head_prefix}.weight", "coefficients"}
        if missing and not starts:
            raise ValueError(f"{name} needs the weights of its base rewards and users, got none for {sorted(missing)}")
        return model


def install(module, new: NewModel | None = None) -> None:
    """Replaces `_get_reward_model`, or an earlier factory of ours, with a `Factory`.

    Args:
        new: what a plain backbone becomes. None: it stays the host's.
    """
    host_factory = unwrap(module._get_reward_model)

    @wraps(host_factory)
    def factory(base_pretrained_model, base_llm_model, value_head_prefix="score", packing_samples=False):
        return Factory(host_factory, new, base_pretrained_model, base_llm_model, value_head_prefix, packing_samples)

    module._get_reward_model = factory
