"""How a plain backbone becomes a factorized reward model in training. It runs in every DeepSpeed rank.

The host builds the model before it reads the data, but the size of the table of users follows from the data. So a new
model begins with a table of one row. It gets its real table when the host asks for the parameters to train, which is
after `rm.data` has found the users.
"""

import importlib
import inspect

import torch
import wrapt
from peft import PeftModel

from openrlhf_pgrpo.host import reward_factory
from openrlhf_pgrpo.host.reward_factory import NewModel
from openrlhf_pgrpo.host.rows import TEMPLATE
from openrlhf_pgrpo.host.text_forms import asked_form
from openrlhf_pgrpo.host.user_rewards import factorized_folder
from openrlhf_pgrpo.models import backbone
from openrlhf_pgrpo.models.folder import LENGTH, forget_scale
from openrlhf_pgrpo.models.form import KEY as FORM
from openrlhf_pgrpo.models.form import Writer, recorded
from openrlhf_pgrpo.models.network import longest_text, skeleton
from openrlhf_pgrpo.models.output_folder import FITTED


def install(module) -> None:
    """Makes the host build factorized reward models, and keep the head of one that is trained already."""

    def build(wrapped, _instance, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        if call.get("init_value_head") and factorized_folder(call["model_name_or_path"]) is not None:
            kwargs = {**kwargs, "init_value_head": False}
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "get_llm_for_sequence_regression", build)


def prepare(args) -> None:
    """Tells the host's factory what a plain backbone becomes; nested arguments of the host's script.

    Raises:
        ValueError: the model to start from is a factorized one that does not fit the flags, is no backbone, has no
            chat template though one is asked for, or reads no texts as long as `--data.max_len`.
    """
    options, name = args.reward, args.model.model_name_or_path
    folder, new = factorized_folder(name), None
    if folder is not None:
        _check_start(args, folder)
        _check_form(args, folder)
        _check_length(args, folder.max_length)
    elif options.factors is not None:
        config = backbone.read_config(name)
        backbone.check(config, name)
        _check_length(args, longest_text(skeleton(config)))
        new = NewModel(options.factors, options.pooling or "last", asked_form(args.data, name), args.data.max_len)
    reward_factory.install(importlib.import_module("openrlhf.models.model"), new)


def _check_start(args, folder) -> None:
    start, there = args.model.model_name_or_path, folder.config.base_reward_pooling
    if args.reward.factors is None:
        raise ValueError(
            f"--model.model_name_or_path {start} is a factorized reward model and needs --reward.factors and "
            "--data.user_key, got none: add them, or name a plain model"
        )
    for flag, got, needed in (
        ("reward.factors", args.reward.factors, folder.config.base_rewards),
        ("reward.pooling", args.reward.pooling or there, there),
        ("ds.value_head_prefix", args.ds.value_head_prefix, folder.head_name),
    ):
        if got != needed:
            raise ValueError(
                f"--{flag} needs to be {needed}, as in {start}, got {got}: change the flag, or name another model"
            )


def _check_form(args, folder) -> None:
    """A table of rewards keeps its meaning only on texts that are written as before."""
    if not recorded(folder.config):
        return  # the flags say it from now on
    name, asked = args.model.model_name_or_path, asked_form(args.data, args.model.model_name_or_path)
    tokenizer = backbone.read_tokenizer(name)
    if not Writer(asked, tokenizer).same_prompts(Writer(folder.form, tokenizer)):
        raise ValueError(
            f"training needs prompts written as those of {name}, {folder.form}, got {asked} or another template: "
            f"change {TEMPLATE}, --data.tokenizer_chat_template or --data.input_template, or name another model"
        )


def _check_length(args, longest: int) -> None:
    if args.data.max_len > longest:
        raise ValueError(
            f"--data.max_len needs to be at most {longest}, the longest text that {args.model.model_name_or_path} "
            f"reads, got {args.data.max_len}: lower it"
        )


def trained_parameters(strategy, get, model, **kwargs):
    """The result of `get`, the host's `_get_model_parameters`, with the users' table in a group of its own.

    Head and table train even where adapters have frozen the rest.
    """
    plain, args = without_adapters(model), strategy.args
    forget_scale(plain.config)
    setattr(plain.config, LENGTH, args.data.max_len)
    setattr(plain.config, FORM, asked_form(args.data, args.model.model_name_or_path).record())
    setattr(plain.config, FITTED, False)  # from here on it holds more than `openrlhf-pgrpo factorize` can make
    if factorized_folder(args.model.model_name_or_path) is None:
        _add_table(plain, len(strategy.reward_users), args.train.seed)
    head, table = (parameter.requires_grad_(True) for parameter in own_parameters(plain))
    if args.ds.zero_stage == 3:
        # ZeRO-3 needs one dtype for all that trains, and adapters are made in another.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(head.dtype)
    model, groups = get(model, **kwargs)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not table]
    groups.append({"params": [table], "lr": args.reward.coefficients_lr, "weight_decay": 0.0})
    return model, groups


def _add_table(model, users: int, seed: int) -> None:
    """Gives a new model the coefficients (U, D) of its users, the same on every rank.

    They start short, so that the data soon turn every user the right way. At a length of 1, the head would adapt to
    the random start, and some users would stay on the wrong side for epochs.
    """
    head, factors = getattr(model, model.value_head_prefix).weight, model.config.base_rewards
    drawn = torch.randn(users, factors, generator=torch.Generator().manual_seed(seed))
    model.coefficients = torch.nn.Parameter((0.1 * factors**-0.5 * drawn).to(head.device, head.dtype))
    model.config.base_reward_users = users


def own_parameters(model) -> list[torch.nn.Parameter]:
    """Head and coefficients of a factorized reward model without adapters."""
    return [getattr(model, model.value_head_prefix).weight, model.coefficients]


def without_adapters(model):
    """The model inside its adapters, if it has some."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
