"""How we get into a host that has no plug-in mechanism: which modules we touch, and what we expect to find there.

The host trains in Ray actors that import it afresh, so a patch made in the driver alone is silently half-applied.
Instead, every process registers post-import hooks (wrapt) on the modules that *define* what we replace: the driver in
`doors.activate`, before it imports the host, and every Ray worker in `setup_worker`, which Ray calls first. A hook
checks the shape of its seam and then hands over to one short file beside this one.

This module runs in every Ray worker and therefore imports nothing heavy.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from typing import NamedTuple

import wrapt

from openrlhf_pgrpo.host import cpu

HOST_VERSIONS = ("0.11.2",)
DEVICE = "OPENRLHF_PGRPO_DEVICE"


class Seam(NamedTuple):
    """One place of the host that we replace: the functions it must have, with parameters, and who replaces them."""

    contract: dict[str, tuple[str, ...]]
    install: str


REWARD_MODEL = Seam(
    {
        "_get_reward_model": ("base_pretrained_model", "base_llm_model", "value_head_prefix", "packing_samples"),
    },
    "openrlhf_pgrpo.host.reward_model:install",
)

CHECKPOINTS = Seam(
    {
        "DeepspeedStrategy.save_ckpt": (
            *("self", "model", "save_dir", "tag", "max_num", "max_mem", "client_state", "save_latest"),
            *("metric_value", "metric_key"),
        ),
        "DeepspeedStrategy._read_ckpt_metric": ("self", "ckpt_dir"),
    },
    "openrlhf_pgrpo.host.whole_checkpoints:install",
)

SEAMS = {
    "openrlhf.datasets.utils": Seam(
        {
            "blending_datasets": (
                *("datasets", "probabilities", "strategy", "seed", "max_count"),
                *("stopping_strategy", "dataset_split"),
            )
        },
        "openrlhf_pgrpo.host.prompts:install_check",
    ),
    "openrlhf.datasets.prompts_dataset": Seam(
        {"PromptDataset.__init__": ("self", "dataset", "tokenizer", "strategy", "input_template")},
        "openrlhf_pgrpo.host.prompts:install_tags",
    ),
    "openrlhf.models.model": REWARD_MODEL,
    "openrlhf.trainer.ppo_utils.experience_maker": Seam(
        {
            "RemoteExperienceMaker.__init__": (
                *("self", "actor_model_group", "critic_model_group", "reward_model_group", "initial_model_group"),
                *("kl_controller", "strategy", "tokenizer", "kwargs"),
            ),
            "RemoteExperienceMaker.make_experience_batch": ("self", "rollout_samples"),
            "RemoteExperienceMaker.make_experience": ("self", "samples_list"),
            "RemoteExperienceMaker.compute_advantages_and_returns": ("self", "experiences"),
            "RemoteExperienceMaker.get_cumulative_returns": ("self", "rewards", "action_mask", "gamma"),
            "apply_length_penalties": ("experiences", "args"),
            "compute_reward": ("r", "kl_coef", "kl", "action_mask", "reward_clip_range"),
        },
        "openrlhf_pgrpo.host.experience_maker:install",
    ),
    "openrlhf.trainer.ppo_trainer": Seam(
        {
            "BasePPOTrainer.__init__": (
                *("self", "strategy", "actor_model_group", "critic_model_group", "reward_model_group"),
                *("reference_model_group", "vllm_engines", "tokenizer"),
            ),
            "BasePPOTrainer.save_logs_and_checkpoints": ("self", "global_step", "logs_dict", "client_states"),
            "BasePPOTrainer.init_checkpoint_states": ("self",),
        },
        "openrlhf_pgrpo.host.metrics:install",
    ),
    "openrlhf.utils.deepspeed.deepspeed": CHECKPOINTS,
}

# The preference trainer has no Ray: every rank runs the host's script itself, and no worker needs these.
PREFERENCE_SEAMS = {
    "openrlhf.datasets.reward_dataset": Seam(
        {
            "RewardDataset.__init__": (
                *("self", "dataset", "tokenizer", "max_length", "strategy", "input_template", "is_dpo"),
                "num_processors",
            ),
            "RewardDataset.process_data": ("self", "data"),
        },
        "openrlhf_pgrpo.host.preference_data:install",
    ),
    "openrlhf.utils.deepspeed.deepspeed": Seam(
        {
            "DeepspeedStrategy.load_ckpt": (
                *("self", "model", "load_dir", "tag", "load_module_strict", "load_optimizer_states"),
                *("load_lr_scheduler_states", "load_module_only"),
            ),
            **CHECKPOINTS.contract,
        },
        "openrlhf_pgrpo.host.preference_checkpoints:install",
    ),
    "openrlhf.trainer.dpo_trainer": Seam(
        {
            "DPOTrainer.__init__": (
                *("self", "model", "ref_model", "strategy", "tokenizer", "optim", "train_dataloader"),
                *("eval_dataloader", "scheduler", "max_norm", "beta", "max_epochs", "save_hf_ckpt", "disable_ds_ckpt"),
            ),
            "DPOTrainer.concatenated_forward": (
                *("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask", "prompt_id_lens"),
            ),
            "DPOTrainer.save_logs_and_checkpoints": (
                *("self", "args", "global_step", "step_bar", "logs_dict", "client_states"),
            ),
            "DPOTrainer.evaluate": ("self", "eval_dataloader", "steps"),
            "DPOLoss.forward": (
                *("self", "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps"),
                "reference_rejected_logps",
            ),
        },
        "openrlhf_pgrpo.host.preference_trainer:install",
    ),
}

# Nor has the reward-model trainer.
REWARD_SEAMS = {
    "openrlhf.models.model": Seam(
        {
            **REWARD_MODEL.contract,
            "get_llm_for_sequence_regression": (
                *("model_name_or_path", "model_type", "param_dtype", "load_in_4bit", "lora_rank", "lora_alpha"),
                *("target_modules", "lora_dropout", "normalize_reward", "attn_implementation", "ds_config"),
                *("init_value_head", "value_head_prefix", "device_map", "packing_samples", "experts_implementation"),
                "kwargs",
            ),
        },
        "openrlhf_pgrpo.host.reward_model:install_training",
    ),
    "openrlhf.datasets.reward_dataset": Seam(
        {
            **PREFERENCE_SEAMS["openrlhf.datasets.reward_dataset"].contract,
            "RewardDataset.__getitem__": ("self", "idx"),
        },
        "openrlhf_pgrpo.host.reward_data:install",
    ),
    "openrlhf.utils.deepspeed.deepspeed": Seam(
        {
            **PREFERENCE_SEAMS["openrlhf.utils.deepspeed.deepspeed"].contract,
            "DeepspeedStrategy._get_model_parameters": ("self", "model", "optim", "weight_decay"),
            "DeepspeedStrategy.save_model": ("self", "model", "tokenizer", "output_dir", "kwargs"),
        },
        "openrlhf_pgrpo.host.reward_checkpoints:install",
    ),
    "openrlhf.trainer.rm_trainer": Seam(
        {
            "RewardModelTrainer.__init__": (
                *("self", "model", "strategy", "optim", "train_dataloader", "eval_dataloader", "scheduler"),
                *("tokenizer", "max_norm", "max_epochs", "loss", "disable_ds_ckpt", "save_hf_ckpt"),
            ),
            "RewardModelTrainer.concatenated_forward": (
                *("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask"),
            ),
            "RewardModelTrainer.concatenated_inputs": ("self", "chosen_ids", "c_mask", "reject_ids", "r_mask"),
            "RewardModelTrainer.save_logs_and_checkpoints": (
                *("self", "args", "global_step", "step_bar", "logs_dict", "client_states"),
            ),
            "RewardModelTrainer.evaluate": ("self", "eval_dataloader", "steps"),
            "PairWiseLoss.forward": ("self", "chosen_reward", "reject_reward", "margin"),
        },
        "openrlhf_pgrpo.host.reward_trainer:install",
    ),
}


class SeamError(RuntimeError):
    """The host is not what this version was written for; nothing was replaced."""


def setup_worker(seams: dict[str, Seam] = SEAMS) -> None:
    """Registers the hooks of this process; Ray's `worker_process_setup_hook`. Calling it again changes nothing."""
    if setup_worker.done:
        return
    hooks = [(name, _hook(seam)) for name, seam in seams.items()]
    if os.environ[DEVICE] == "cpu":
        hooks += cpu.PATCHES.items()
    for name, hook in hooks:
        # The package itself may be there: `python -m` imports the parents of the host's script before it runs it.
        if name.startswith("openrlhf.") and name in sys.modules:
            raise SeamError(f"openrlhf_pgrpo needs to come before the host, got {name} already imported")
    for name, hook in hooks:
        wrapt.register_post_import_hook(hook, name)
    setup_worker.done = True


setup_worker.done = False


def _hook(seam: Seam):
    def check_and_install(module) -> None:
        for path, expected in seam.contract.items():
            check_contract(module, path, expected)
        where, function = seam.install.split(":")
        getattr(importlib.import_module(where), function)(module)

    return check_and_install


def check_contract(module, path: str, expected: tuple[str, ...]) -> None:
    """Raises SeamError unless `path` in `module` is a function with the parameters `expected`, by name and order."""
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    parameters = tuple(inspect.signature(found).parameters) if callable(found) else None
    if parameters and parameters[-1] == "_ray_trace_ctx":  # ray.remote adds it to all methods of a class, in place
        parameters = parameters[:-1]
    if parameters != expected:
        raise SeamError(
            f"openrlhf_pgrpo needs {module.__name__}.{path}({', '.join(expected)}), found "
            f"{'nothing callable' if parameters is None else '(' + ', '.join(parameters) + ')'}: install one of the "
            f"hosts it was tested with, openrlhf {', '.join(HOST_VERSIONS)}"
        )


def check_version() -> None:
    """Raises SeamError unless the installed host is one that this version was tested with."""
    if importlib.util.find_spec("openrlhf") is None:
        raise SeamError(f"openrlhf_pgrpo needs its host: pip install openrlhf=={HOST_VERSIONS[0]}")
    found = importlib.metadata.version("openrlhf")
    if found not in HOST_VERSIONS:
        raise SeamError(
            f"openrlhf_pgrpo needs openrlhf {' or '.join(HOST_VERSIONS)}, found {found}: "
            f"pip install openrlhf=={HOST_VERSIONS[0]}"
        )
