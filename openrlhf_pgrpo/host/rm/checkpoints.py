"""What DeepSpeed and its checkpoints have to know about a factorized reward model. It runs in every DeepSpeed rank.

The table of users has a learning rate of its own, a checkpoint is checked before it is loaded, and the saved folder is
complete, with every ZeRO stage and with adapters.
"""

import inspect
from pathlib import Path

import torch
import wrapt
from deepspeed import zero
from deepspeed.utils import safe_get_full_fp32_param
from peft.tuners.lora import LoraLayer

from openrlhf_pgrpo.host import resume, text_forms
from openrlhf_pgrpo.host.flags import in_our_runs
from openrlhf_pgrpo.host.rm import flags
from openrlhf_pgrpo.host.rm.model import own_parameters, trained_parameters, without_adapters
from openrlhf_pgrpo.models import folder
from openrlhf_pgrpo.models.form import Form


def install(module) -> None:
    """Wraps what `DeepspeedStrategy` does with a model in a training with `--reward.factors`, and with checkpoints and
    copies of plain ones."""

    def parameters(wrapped, strategy, args, kwargs):
        if strategy.args.reward.factors is None:
            return wrapped(*args, **kwargs)
        return trained_parameters(strategy, wrapped, *args, **kwargs)

    def load(wrapped, strategy, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        current = None if strategy.args.reward.factors is None else state(strategy, call["model"])
        check_before_loading(Path(call["load_dir"]), call.get("tag"), current)
        return wrapped(*args, **kwargs)

    def save(wrapped, strategy, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        # The host's script says it of the last model alone, and whoever reads a copy made before would draw a head.
        strategy._unwrap_model(call["model"]).config.value_head_prefix = strategy.args.ds.value_head_prefix
        if strategy.args.reward.factors is None:
            return wrapped(*args, **kwargs)
        return _save(strategy, call["model"], call["tokenizer"], call["output_dir"])

    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy._get_model_parameters", in_our_runs(parameters))
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.load_ckpt", in_our_runs(load))
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.save_model", in_our_runs(save))


def state(strategy, model) -> dict:
    """Our state in a checkpoint of this run."""
    config, args = strategy._unwrap_model(model).config, strategy.args
    settings = flags.settings(args, config.base_reward_pooling)
    settings |= text_forms.settings(args.data, Form(**config.base_reward_form))
    return {"schema": resume.SCHEMA, "settings": settings, "users": list(strategy.reward_users)}


def check_before_loading(path: Path, tag: str | None, current: dict | None) -> None:
    """Refuses a checkpoint of other users or settings before DeepSpeed finds tensors of other shapes in it.

    Args:
        current: our state in a checkpoint of this run; None if it trains the host's one reward.

    Raises:
        ValueError: names all that differs, with both values.
    """
    tag = tag or resume.latest(path)
    parts = sorted((path / tag).glob("*model_states.pt")) if tag else []
    if not parts:
        return  # the host itself reports what is missing
    saved = torch.load(parts[0], map_location="cpu", weights_only=False, mmap=True).get(resume.KEY)
    content = "a factorized reward model"
    if current is None:
        return resume.refuse_unused(saved, content, "reward.factors")
    resume.check_schema(saved, content, resume.ANEW)
    resume.check_settings(saved["settings"], current["settings"], resume.ANEW, *_other_users(saved, current))


def _other_users(saved: dict, current: dict) -> list[str]:
    """How the users differ, in words; empty if they do not."""
    there, here = saved["users"], current["users"]
    if there == here:
        return []
    lost, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    first = f"{lost[0]!r} only there" if lost else f"{new[0]!r} only now" if new else "in another order"
    return [f"{len(there)} users in the checkpoint, {len(here)} now, {first}"]


@torch.no_grad()
def _save(strategy, engine, tokenizer, path) -> None:
    """Writes the folder of a factorized reward model. All ranks call it.

    Head and table come from the optimizer's float32 copies, which training in bf16 keeps. Adapters are merged, because
    the host would save them alone, without the head that they were trained with.
    """
    from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync

    model = without_adapters(strategy._unwrap_model(engine))
    weights = {}
    for name, weight in _weights(model, "", split=strategy.args.ds.zero_stage == 3):
        if strategy.is_rank_0():
            weights[name] = weight
    weights |= _float32_parameters(model)
    if strategy.is_rank_0():
        folder.save(path, model.config, weights, list(strategy.reward_users), tokenizer)
    torch_dist_barrier_and_cuda_sync()


def _weights(module, prefix: str, split: bool):
    """Name and weight on the CPU, of every parameter and saved buffer, with adapters merged."""
    adapted = isinstance(module, LoraLayer)
    with zero.GatheredParameters(list(module.parameters(recurse=adapted)), enabled=split):
        if adapted:
            layer = module.get_base_layer()
            for name, weight in layer.named_parameters(recurse=False):
                if name == "weight":
                    weight = (weight.float() + module.get_delta_weight("default").float()).to(weight.dtype)
                yield prefix + name, weight.cpu().clone()
            return
        for name, weight in module.named_parameters(recurse=False):
            yield prefix + name, weight.cpu().clone()
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer.cpu().clone()
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", split)


def _float32_parameters(model) -> dict[str, torch.Tensor]:
    """Head and table, float32."""
    names = (f"{model.value_head_prefix}.weight", "coefficients")
    return {name: _float32(parameter) for name, parameter in zip(names, own_parameters(model))}


def _float32(parameter) -> torch.Tensor:
    """The optimizer's copy. DeepSpeed does not give it away without ZeRO: then what the model itself computes with."""
    copy = safe_get_full_fp32_param(parameter)
    return (parameter if copy is None else copy).float().cpu().clone()
