"""The factorized reward model in the host's own factory, which training, serving and PPO all go through.

A folder with the config of a factorized model becomes our class, and so does a plain backbone that a training of ours
starts from. For everything else the host builds its own class, by its own code.
"""

from functools import wraps
from inspect import unwrap
from typing import NamedTuple

from openrlhf_pgrpo.files import reading
from openrlhf_pgrpo.models import backbone
from openrlhf_pgrpo.models.folder import COEFFICIENTS, Folder, describe, is_factorized
from openrlhf_pgrpo.models.form import Form
from openrlhf_pgrpo.models.network import factorized_reward_model


class NewModel(NamedTuple):
    """What training turns a plain backbone into: D base rewards, how a text becomes a state, how texts are written,
    and how long they may be."""

    factors: int
    pooling: str
    form: Form
    max_length: int | None = None


class Factory:
    """Replaces the class of a reward model in the host. It chooses the class in `from_pretrained`, where the config is
    known."""

    def __init__(self, host_factory, new: NewModel | None, *classes):
        self.host_factory, self.new, self.classes = host_factory, new, classes

    def from_pretrained(self, name, *, config, **kwargs):
        made_here: set[str] = set()
        if is_factorized(config):
            Folder(name).check_shapes()
        elif self.new is not None:
            backbone.check(config, name)
            # The table of users has one row for now, because the host has not read its data yet.
            describe(config, self.new.factors, 1, self.new.pooling, self.new.form, self.new.max_length)
            made_here = {f"{self.classes[2]}.weight", COEFFICIENTS}
        else:
            return self.host_factory(*self.classes).from_pretrained(name, config=config, **kwargs)
        with reading(f"the weights of {name}"):
            model, report = factorized_reward_model(*self.classes).from_pretrained(
                name, config=config, output_loading_info=True, **kwargs
            )
        backbone.check_complete(set(report["missing_keys"]) - made_here, name)
        backbone.check_finite(model.named_parameters(), name)
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
