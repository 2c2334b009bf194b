"""What the hooks of this folder replace in every process, right after a module of the host was imported.

OpenRLHF is written for CUDA. Each patch here replaces, in place, a function that cannot work without a GPU. It names
what the host assumes and when the patch can go. At the end, `PATCHES` lists them.

Light: it runs in every Ray worker and every DeepSpeed rank, so every patch imports what it needs.
"""

import gc
import importlib.util
import os
import sys
import types

import wrapt

from openrlhf_pgrpo.host.cpu.bfloat16 import speed_up_bfloat16
from openrlhf_pgrpo.host.cpu.launch import ENGINE_THREADS
from openrlhf_pgrpo.host.cpu.memory import keep_memory

VLLM_EXTENSION = "openrlhf_pgrpo.host.cpu.vllm_worker.WeightsFromFile"


def import_faster() -> None:
    """Lets this process look for garbage less often. To import torch, vLLM and DeepSpeed makes millions of objects and
    no garbage, and looking for it took 15 % of that time."""
    gc.set_threshold(50_000, 20, 20)


# ---------------------------------------------------------------------------------------------------------------------
# What the host needs of CUDA and flash-attn
# ---------------------------------------------------------------------------------------------------------------------


def patch_host(host) -> None:
    """The first import of the host in this process: what all its modules share."""
    stand_in_for_cuda()
    stand_in_for_flash_attn()
    speed_up_bfloat16()


def stand_in_for_cuda() -> None:
    """Host: `torch.cuda.current_device()` as a target of `.to` (launcher, ppo_actor, ppo_critic, deepspeed, ...), and
    set_device, synchronize and empty_cache, called without asking for a GPU.

    They raise on a torch without CUDA, so nothing that works depends on them.
    Remove once the host asks `torch.accelerator`, or any one place, for its device.
    """
    import torch

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def stand_in_for_flash_attn() -> None:
    """Host: models/ring_attn_utils.py imports five functions of flash-attn, for packed samples, at its top.

    We make the two modules that it names, without their parent. So `import` finds them, and code that asks whether
    flash_attn is installed (transformers, vLLM, the host's faster cross entropy) still finds that it is not.
    Remove once the host imports flash-attn where it uses it.
    """
    if importlib.util.find_spec("flash_attn"):
        return

    def absent(*args, **kwargs):
        raise RuntimeError("Packed samples need flash-attn, which is not installed; leave --ds.packing_samples out.")

    functions = {
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils.distributed": ("all_gather",),
    }
    for name, members in functions.items():
        module = types.ModuleType(name)
        vars(module).update(dict.fromkeys(members, absent))
        sys.modules[name] = module


def patch_replay_buffer(module) -> None:
    """Host: NaiveReplayBuffer.__init__ builds `cuda:{current_device()}`, and "cuda:cpu" is no device.

    Remove together with `stand_in_for_cuda`.
    """
    import torch

    def on_cpu(init, buffer, args, kwargs):
        stand_in, torch.cuda.current_device = torch.cuda.current_device, lambda: 0
        try:
            init(*args, **kwargs)
        finally:
            torch.cuda.current_device = stand_in
        buffer.target_device = torch.device("cpu")

    wrapt.wrap_function_wrapper(module, "NaiveReplayBuffer.__init__", on_cpu)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed
# ---------------------------------------------------------------------------------------------------------------------


def patch_strategy(module) -> None:
    """Host: utils/deepspeed/deepspeed.py asks for a mesh of "cuda" devices, and averages the EMA model on "cuda".

    Remove once the host takes both from the accelerator. Who imports it trains, and trains faster with memory kept.
    """
    keep_memory()

    def on_cpu(init_device_mesh, _, args, kwargs):
        return init_device_mesh("cpu", *args[1:], **kwargs)

    def average_on_cpu(moving_average, _, args, kwargs):
        return moving_average(*args[:3], device="cpu")

    wrapt.wrap_function_wrapper(module, "init_device_mesh", on_cpu)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.moving_average", average_on_cpu)


def patch_optimizer(module) -> None:
    """Host: get_train_ds_config asks for AdamW, which DeepSpeed turns into its FusedAdam, compiled when first used.

    PyTorch's AdamW is the same update, and its fused kernel needs no compiler. ZeRO keeps fp32 master weights for bf16
    either way. Remove once DeepSpeed ships its CPU Adam compiled.
    """

    def torch_adam(get_config, _, args, kwargs):
        config = get_config(*args, **kwargs)
        optimizer = config.get("optimizer", {})
        if optimizer.get("type") == "AdamW":  # Muon is plain PyTorch already
            optimizer["params"] |= {"torch_adam": True, "fused": True}
        return config

    wrapt.wrap_function_wrapper(module, "get_train_ds_config", torch_adam)


def patch_collectives(module) -> None:
    """DeepSpeed: comm/torch.py compiles a shared-memory all-reduce if it finds a CPU and a compiler. gloo is enough.

    Remove once DeepSpeed ships it compiled, or asks first.
    """
    module.build_shm_op = lambda: None


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def patch_availability(module) -> None:
    """transformers: generation/candidate_generator.py imports scikit-learn where it is installed, as it is with us. It
    is for assisted generation, which the host has not, and takes 0.3 s of each process at the start.

    Remove once transformers imports it where it uses it.
    """
    module.is_sklearn_available = lambda: False


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------------


def patch_engine_core(module) -> None:
    """vLLM: starts its engine core in a fresh Python, which has none of these hooks, and so would import scikit-learn
    and look for garbage as often as any.

    Remove once `import_faster` and `patch_availability` are gone.
    """
    from openrlhf_pgrpo.host.cpu.engine_core import StartsHooked

    def hooked(get_context, _, args, kwargs):
        return StartsHooked(get_context(*args, **kwargs))

    wrapt.wrap_function_wrapper(module, "get_mp_context", hooked)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: from DeepSpeed to vLLM
# ---------------------------------------------------------------------------------------------------------------------


def patch_engine(module) -> None:
    """Host: create_vllm_engines names the worker extension that receives weights through NCCL, and gives an engine the
    environment of every process, in which threads are few.

    Remove once users of the host can name both.
    """

    def with_ours(options, _, args, kwargs):
        threads = {"OMP_NUM_THREADS": os.environ[ENGINE_THREADS]}
        engine = options(*args, runtime_env={"env_vars": threads}, **kwargs)
        start = engine.remote
        engine.remote = lambda **settings: start(**{**settings, "worker_extension_cls": VLLM_EXTENSION})
        return engine

    wrapt.wrap_function_wrapper(module, "RolloutRayActor.options", with_ours)


def patch_weight_sync(module) -> None:
    """Host: ActorPPOTrainer joins a NCCL group with the vLLM engines and broadcasts one parameter after the other.

    Here rank 0 writes all of them into one file, and every engine reads it: see `send_weights`.
    Remove once the host's weight sync can run on gloo.
    """
    module.ActorPPOTrainer._init_vllm_sync_group = lambda trainer, backend: None
    module.ActorPPOTrainer.broadcast_to_vllm = send_weights


def send_weights(trainer) -> None:
    """Replaces ActorPPOTrainer.broadcast_to_vllm; every rank calls it.

    Every engine gets the file in one call of the host's `update_weight`: name holds the path, and shape
    the number of tensors. On a cluster the file lies in --ckpt.path, which all nodes see.
    """
    import tempfile

    import deepspeed
    import ray
    import torch
    from safetensors.torch import save_file

    engines = trainer.vllm_engines
    args = trainer.strategy.args
    names, parameters = zip(*trainer.actor.model.module.named_parameters())
    folder = None
    if len(ray.nodes()) > 1:
        folder = os.path.abspath(args.ckpt.path)
        os.makedirs(folder, exist_ok=True)
    with deepspeed.zero.GatheredParameters(list(parameters), enabled=args.ds.zero_stage == 3):
        if torch.distributed.get_rank() == 0:
            with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=folder) as file:
                save_file({name: parameter.data.contiguous() for name, parameter in zip(names, parameters)}, file.name)
                ray.get([engine.update_weight.remote(file.name, None, len(names)) for engine in engines])
            if args.vllm.enable_prefix_caching:
                ray.get([engine.reset_prefix_cache.remote() for engine in engines])
    torch.distributed.barrier()


PATCHES = {
    "deepspeed.comm.torch": patch_collectives,
    "openrlhf": patch_host,
    "openrlhf.trainer.ppo_utils.replay_buffer": patch_replay_buffer,
    "openrlhf.trainer.ray.ppo_actor": patch_weight_sync,
    "openrlhf.trainer.ray.vllm_engine": patch_engine,
    "openrlhf.utils.deepspeed.deepspeed": patch_strategy,
    "openrlhf.utils.deepspeed.deepspeed_utils": patch_optimizer,
    "transformers.utils.import_utils": patch_availability,
    "vllm.v1.engine.utils": patch_engine_core,
}
