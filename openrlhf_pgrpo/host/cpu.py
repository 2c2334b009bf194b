"""The whole host on a machine without a GPU: real Ray, real vLLM, real DeepSpeed, on gloo.

OpenRLHF is written for CUDA. Nothing of it is rewritten here: the hooks in `PATCHES`, which `seams.setup_worker`
registers in every process, run right after a module of the host was executed, and replace in place the few functions
that cannot work without a GPU. vLLM's own process is reached by its worker extension, `vllm_cpu_worker`.

This module runs in every worker, so it imports nothing heavy; every patch imports what it needs.
Each patch names the host assumption it replaces and when it can go. `PATCHES` stands at the end.
"""

import importlib.util
import os
import sys
import types

import wrapt

VLLM_EXTENSION = "openrlhf_pgrpo.host.vllm_cpu_worker.WeightsFromFile"


# ---------------------------------------------------------------------------------------------------------------------
# What the launcher asks for
# ---------------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Environment variables that the driver and every Ray worker need. What the user has set stays."""
    defaults = {
        # DeepSpeed picks its accelerator by what is installed; say it.
        "DS_ACCELERATOR": "cpu",
        # Two trainer ranks of one thread beat one rank of two threads: 23 against 30 s a step for SmolLM2-135M on two
        # cores, where one rank of one thread takes 32 s. So threads are kept few and ranks use the cores.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2)),
        # GiB; without it vLLM wants `gpu_memory_utilization` (host default 0.95) of the machine's memory.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # vLLM would pin its threads to all cores but one.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Keeps vLLM's worker inside its engine process: one process less to start, and no engine that spins on a core
        # while it waits for the worker.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The host (entropy) and vLLM (log-probs) decorate small functions with torch.compile, which on a CPU calls a
        # C++ compiler in the middle of the first step, for half a minute.
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def logical_gpus(args) -> int:
    """The number of GPUs Ray has to believe in: one for every model process and vLLM engine.

    Colocated models need fewer; spare ones cost nothing.
    """
    roles = [args.actor]
    if args.algo.kl.init_coef > 0:
        roles.append(args.ref)
    if args.algo.advantage.estimator == "gae":
        roles.append(args.critic)
    if not (args.reward.remote_url or args.train.agent_func_path):
        roles.append(args.reward)
    engines = (args.vllm.num_engines or 0) * args.vllm.tensor_parallel_size
    return sum(role.num_nodes * role.num_gpus_per_node for role in roles) + engines


def logical_cpus(args) -> int:
    """The number of CPUs Ray has to believe in: one for every logical GPU, and one for each actor that has none.

    Those are the trainer, and in async mode also the sampler, the training actor, and two queues.
    """
    return logical_gpus(args) + (5 if args.train.async_enable else 1)


# Flag: the host's default, which suits a GPU only, and what takes its place.
DEFAULTS = {
    "ds.attn_implementation": ("flash_attention_2", "sdpa"),
    "vllm.enforce_eager": (False, True),
    "actor.num_gpus_per_node": (8, 1),
    "ref.num_gpus_per_node": (8, 1),
    "critic.num_gpus_per_node": (8, 1),
    "reward.num_gpus_per_node": (8, 1),
}


def adapt(args) -> None:
    """Replaces the defaults of the host's command line that suit a GPU only, and says so in one line.

    A value that was typed and equals the default is replaced as well: the parsed arguments do not tell them apart.
    """
    changed = []
    for flag, (default, value) in DEFAULTS.items():
        section, name = flag.split(".")
        values = getattr(args, section, None)  # the preference trainers have fewer sections and flags
        if values is not None and getattr(values, name, None) == default:
            setattr(values, name, value)
            changed.append(f"--{flag} {value}")
    if changed:
        print(f"[pgrpo] no GPU: instead of the host's defaults, {', '.join(changed)}")


# Flag: which values are refused, and what they need.
REFUSED = {
    "ds.packing_samples": (bool, "flash-attn"),
    "train.dynamic_batch_enable": (bool, "packed samples, and they need flash-attn"),
    "ds.ring_attn_size": (lambda size: size > 1, "packed samples, and they need flash-attn"),
    "ds.attn_implementation": (lambda name: "flash" in name, "flash-attn"),
    "vllm.enable_sleep": (bool, "GPU memory to give back"),
    "ds.enable_sleep": (bool, "GPU memory to give back"),
    "vllm.sync_with_ray": (bool, "a CUDA buffer for the weights"),
    "vllm.tensor_parallel_size": (lambda size: size > 1, "a GPU for every shard"),
    "ds.tensor_parallel_size": (lambda size: size > 1, "a GPU for every shard"),
    "ds.load_in_4bit": (bool, "bitsandbytes with CUDA"),
    "ds.param_dtype": (lambda dtype: dtype == "fp16", "a GPU (bf16 works without)"),
    "ds.adam_offload": (bool, "GPU memory to offload, and a compiler"),
    "ds.deepcompile": (bool, "a compiler for CUDA kernels"),
    "ds.use_liger_kernel": (bool, "Triton kernels"),
    "ds.lora.rank": (lambda rank: rank > 0, "a weight sync that merges adapters into the weights of vLLM"),
}


def refuse_unsupported(args) -> None:
    """Raises ValueError, in one sentence, for the first flag that cannot work without a GPU. Call `adapt` before."""
    for flag, (refused, need) in REFUSED.items():
        if flag == "ds.lora.rank" and not hasattr(args, "vllm"):  # the preference trainers send weights to nobody
            continue
        value = args
        for name in flag.split("."):
            value = getattr(value, name, None)  # the preference trainers have fewer flags
        if value is not None and refused(value):
            raise ValueError(
                f"--{flag} needs {need}, got {value} on a machine without a GPU; leave it out, or use a GPU."
            )


# ---------------------------------------------------------------------------------------------------------------------
# What the host takes from CUDA and flash-attn
# ---------------------------------------------------------------------------------------------------------------------


def patch_host(host) -> None:
    """The first import of the host in this process: what all its modules share."""
    stand_in_for_cuda()
    stand_in_for_flash_attn()


def stand_in_for_cuda() -> None:
    """Host: `torch.cuda.current_device()` as a target of `.to` (launcher, ppo_actor, ppo_critic, deepspeed, ...), and
    set_device, synchronize and empty_cache, called without asking for a GPU.

    They raise on a torch without CUDA, so nothing that works can depend on them.
    Goes when the host asks `torch.accelerator`, or any one place, for its device.
    """
    import torch

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def stand_in_for_flash_attn() -> None:
    """Host: models/ring_attn_utils.py imports five functions of flash-attn, for packed samples, at its top.

    Only the two modules it names appear, without their parent: `import` finds them, while a question whether
    flash_attn is installed (transformers, vLLM, and the host's own faster cross entropy) is still answered with no.
    Goes when the host imports flash-attn where it uses it.
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

    Goes with `stand_in_for_cuda`.
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

    Goes when the host takes both from the accelerator.
    """

    def on_cpu(init_device_mesh, _, args, kwargs):
        return init_device_mesh("cpu", *args[1:], **kwargs)

    def average_on_cpu(moving_average, _, args, kwargs):
        return moving_average(*args[:3], device="cpu")

    wrapt.wrap_function_wrapper(module, "init_device_mesh", on_cpu)
    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.moving_average", average_on_cpu)


def patch_optimizer(module) -> None:
    """Host: get_train_ds_config asks for AdamW, which DeepSpeed turns into its FusedAdam, compiled when first used.

    PyTorch's AdamW is the same update, and its fused kernel needs no compiler. ZeRO keeps fp32 master weights for bf16
    either way. Goes when DeepSpeed ships its CPU Adam compiled.
    """

    def torch_adam(get_config, _, args, kwargs):
        config = get_config(*args, **kwargs)
        optimizer = config.get("optimizer", {})
        if optimizer.get("type") == "AdamW":  # Muon is plain PyTorch already
            optimizer["params"] |= {"torch_adam": True, "fused": True}
        return config

    wrapt.wrap_function_wrapper(module, "get_train_ds_config", torch_adam)


def patch_collectives(module) -> None:
    """DeepSpeed: comm/torch.py compiles a shared-memory all-reduce when it meets a CPU and a compiler. gloo will do.

    Goes when DeepSpeed ships it compiled, or asks first.
    """
    module.build_shm_op = lambda: None


# ---------------------------------------------------------------------------------------------------------------------
# Weights: from DeepSpeed to vLLM
# ---------------------------------------------------------------------------------------------------------------------


def patch_engine(module) -> None:
    """Host: create_vllm_engines names the worker extension that receives weights through NCCL.

    Goes when the host lets its user name the extension.
    """

    def with_our_extension(options, _, args, kwargs):
        engine = options(*args, **kwargs)
        start = engine.remote
        engine.remote = lambda **settings: start(**{**settings, "worker_extension_cls": VLLM_EXTENSION})
        return engine

    wrapt.wrap_function_wrapper(module, "RolloutRayActor.options", with_our_extension)


def patch_weight_sync(module) -> None:
    """Host: ActorPPOTrainer joins a NCCL group with the vLLM engines and broadcasts one parameter after the other.

    Here rank 0 writes all of them into one file, and every engine reads it: see `send_weights`.
    Goes when the host's weight sync can run on gloo.
    """
    module.ActorPPOTrainer._init_vllm_sync_group = lambda trainer, backend: None
    module.ActorPPOTrainer.broadcast_to_vllm = send_weights


def send_weights(trainer) -> None:
    """Replaces ActorPPOTrainer.broadcast_to_vllm; every rank calls it.

    The file goes to every engine in one call of the host's `update_weight`, whose name argument carries the path and
    whose shape argument carries the number of tensors. On a cluster it lies in --ckpt.path, which all nodes see.
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
}
