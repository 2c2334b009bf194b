"""What DeepSpeed and its checkpoints have to know of a factorized reward model: a learning rate for the table of users,
a check before a checkpoint is loaded, and a folder that is complete, whatever the ZeRO stage and with adapters too.
"""

import inspect
from pathlib import Path

import torch
import wrapt

from openrlhf_pgrpo.host import reward_model, reward_options, whole_checkpoints
from openrlhf_pgrpo.host.checkpoints import KEY, SCHEMA, differing
from openrlhf_pgrpo.models import factorized_reward


def install(module) -> None:
    """Wraps what `DeepspeedStrategy` does with the model that this process trains, if that is a factorized one."""

    def groups(wrapped, strategy, args, kwargs):
        model, found = wrapped(*args, **kwargs)
        if reward_model.training is not None:
            _, table = reward_model.own_parameters(model)
            for group in found:
                group["params"] = [parameter for parameter in group["params"] if parameter is not table]
            found.append({"params": [table], "lr": strategy.args.reward.coefficients_lr, "weight_decay": 0.0})
        return model, found

    def load(wrapped, strategy, args, kwargs):
        if reward_model.training is not None:
            call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
            _check(Path(call["load_dir"]), call.get("tag"), strategy.args)
        return wrapped(*args, **kwargs)

    def save(wrapped, strategy, args, kwargs):
        if reward_model.training is None:
            return wrapped(*args, **kwargs)
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        return _save(strategy, call["model"], call["tokenizer"], call["output_dir"])

    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy._get_model_parameters", groups)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.load_ckpt", load)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.save_model", save)
    whole_checkpoints.install(module)


def _check(folder: Path, tag: str | None, args) -> None:
    """Refuses a checkpoint of other users or settings before DeepSpeed finds tensors of other shapes in it.

    Raises:
        ValueError: names all that differs, with both values.
    """
    latest = folder / "latest"
    if tag is None and latest.exists():
        tag = latest.read_text().strip()
    parts = sorted((folder / tag).glob("*model_states.pt")) if tag else []
    if not parts:
        return  # the host says what it does not find
    state = torch.load(parts[0], map_location="cpu", weights_only=False, mmap=True).get(KEY)
    if state is None or state.get("schema") != SCHEMA:
        found = "one without" if state is None else f"schema {state.get('schema')!r}"
        raise ValueError(
            f"resuming needs a checkpoint of a factorized reward model in schema {SCHEMA}, got {found}: resume it with "
            "the flags and the version that wrote it, or start anew without --ckpt.load_enable"
        )
    unlike = differing(state["settings"], reward_options.settings(args))
    pairs = [f"--{name} {there!r} in the checkpoint, {here!r} now" for name, there, here in unlike]
    there, here = state["users"], reward_model.training.users
    if there != here:
        lost, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
        first = f"{lost[0]!r} only there" if lost else f"{new[0]!r} only now" if new else "in another order"
        pairs.append(f"{len(there)} users in the checkpoint, {len(here)} now, {first}")
    if pairs:
        raise ValueError(
            f"resuming needs the settings and users of the checkpoint, got {'; '.join(pairs)}: use those, or start "
            "anew without --ckpt.load_enable"
        )


@torch.no_grad()
def _save(strategy, engine, tokenizer, folder) -> None:
    """Writes the folder of a factorized reward model. All ranks call it.

    Head and table come from the optimizer's float32 copies, which training in bf16 keeps, and adapters are merged: the
    host would save those alone, without the head they were trained with.
    """
    from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync
    from peft import PeftModel

    model = strategy._unwrap_model(engine)
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = {}
    for name, weight in _weights(plain, "", split=strategy.args.ds.zero_stage == 3):
        if strategy.is_rank_0():
            weights[name] = weight
    weights |= _precise(plain)
    if strategy.is_rank_0():
        factorized_reward.save(folder, plain.config, weights, reward_model.training.users, tokenizer)
    torch_dist_barrier_and_cuda_sync()


def _weights(module, prefix: str, split: bool):
    """Name and weight on the CPU, of every parameter and saved buffer, as they are without adapters."""
    from deepspeed import zero
    from peft.tuners.lora import LoraLayer

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


def _precise(model) -> dict[str, torch.Tensor]:
    """Head and table, float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    names = (f"{model.value_head_prefix}.weight", "coefficients")
    found = zip(names, reward_model.own_parameters(model))
    return {name: safe_get_full_fp32_param(parameter).float().cpu().clone() for name, parameter in found}
