"""The factorized reward model in the host's own factory, which training, serving and PPO all go through.

What a folder's config calls factorized becomes our class, and so does any backbone in a process that trains one; for
everything else the host's own class is built, by the host's own code.
"""

from typing import NamedTuple

import torch
import wrapt

from openrlhf_pgrpo.models.factorized_reward import describe, factorized_reward_model, is_factorized


class Training(NamedTuple):
    """What this process trains: the number D of base rewards, how a text becomes one state, the users (U,) by row."""

    factors: int
    pooling: str
    users: list[str]


# The host calls its factory with nothing but classes; `reward_options.prepare` says here what is to be trained.
training: Training | None = None


class Factory:
    """Stands where the host expects the class of a reward model, until it is loaded and there is a config to go by."""

    def __init__(self, host_factory, *classes):
        self.host_factory, self.classes = host_factory, classes

    def from_pretrained(self, name, *, config, **kwargs):
        starts = training is not None and not is_factorized(config)
        if starts:
            describe(config, training.factors, len(training.users), training.pooling)
        if not is_factorized(config):
            return self.host_factory(*self.classes).from_pretrained(name, config=config, **kwargs)
        model, report = factorized_reward_model(*self.classes).from_pretrained(
            name, config=config, output_loading_info=True, **kwargs
        )
        missing = report["missing_keys"] & {f"{model.value_head_prefix}.weight", "coefficients"}
        if missing and not starts:
            raise ValueError(f"{name} needs the weights of its base rewards and users, got none for {sorted(missing)}")
        if starts:
            _start(model)
        return model


def install(module) -> None:
    """Puts `Factory` in the place of `_get_reward_model`."""
    host_factory = module._get_reward_model

    def factory(base_pretrained_model, base_llm_model, value_head_prefix="score", packing_samples=False):
        return Factory(host_factory, base_pretrained_model, base_llm_model, value_head_prefix, packing_samples)

    module._get_reward_model = factory


def install_training(module) -> None:
    """The same, and lets the head and the table train beside adapters. Not for Ray, which pickles what is replaced."""

    def build(wrapped, _instance, args, kwargs):
        if training is None:
            return wrapped(*args, **kwargs)
        # The host would give the head of a model that is already trained its first values again.
        model = wrapped(*args, **{**kwargs, "init_value_head": False})
        head, _ = (parameter.requires_grad_(True) for parameter in own_parameters(model))
        if kwargs["ds_config"]["zero_optimization"]["stage"] == 3:
            # It wants all that trains in one dtype, and adapters are born in another.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(head.dtype)
        return model

    install(module)
    wrapt.wrap_function_wrapper(module, "get_llm_for_sequence_regression", build)


def own_parameters(model) -> list[torch.nn.Parameter]:
    """Head and coefficients of a factorized reward model, with adapters or without."""
    return [getattr(model, model.value_head_prefix).weight, model.coefficients]


@torch.no_grad()
def _start(model) -> None:
    """First values: a head as the host draws one, and short coefficients, so that data soon turn every user around.

    At a length of 1 the head adapts to users as they were drawn, and some stay on the wrong side for epochs.
    """
    import deepspeed  # here, because a server starts without it
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    head, coefficients = own_parameters(model)
    with deepspeed.zero.GatheredParameters([head, coefficients], modifier_rank=0, enabled=is_deepspeed_zero3_enabled()):
        head.normal_(std=1 / (head.shape[1] + 1))
        coefficients.normal_(std=0.1 * coefficients.shape[1] ** -0.5)
